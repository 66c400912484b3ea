//! How a worker shares its connections.

#[path = "support/hbone.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use adit_shared::hbone::{
    CheckoutError, Connection, Incoming, Pool, PoolSettings, Retry, Settings, Tunnel,
};
use adit_shared::net::drain::DrainMode;
use support::*;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::Instant;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Refused;

type TestPool = Pool<&'static str, Refused>;

/// Makes connections to servers of its own and counts them.
#[derive(Clone, Default)]
struct Connector {
    made: Rc<Cell<usize>>,
    servers: Rc<RefCell<Vec<Server>>>,
    settings: Settings,
}

impl Connector {
    async fn connect(&self) -> Result<Connection, Refused> {
        self.connect_with(echo).await
    }

    async fn connect_with(
        &self,
        handler: impl AsyncFn(Incoming) + 'static,
    ) -> Result<Connection, Refused> {
        self.made.set(self.made.get() + 1);
        let (connection, server) = connect(self.settings, handler).await;
        self.servers.borrow_mut().push(server);
        Ok(connection)
    }

    async fn checkout(&self, pool: &TestPool, key: &'static str) -> Tunnel {
        let opened = pool
            .checkout(&key, &request(), patience(), async || self.connect().await)
            .await;
        opened.expect("checkout").0
    }

    fn spawn(&self, pool: &TestPool, key: &'static str) -> JoinHandle<Tunnel> {
        let (connector, pool) = (self.clone(), pool.clone());
        spawn_local(async move { connector.checkout(&pool, key).await })
    }
}

fn small(max_streams: usize) -> PoolSettings {
    PoolSettings {
        max_streams,
        ..PoolSettings::default()
    }
}

#[test]
fn one_connection_serves_checkouts_that_follow_each_other() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        for _ in 0..10 {
            let mut tunnel = connector.checkout(&pool, "a").await;
            write(&mut tunnel, "x").await;
            assert_eq!(read(&mut tunnel, 1).await, b"x");
        }
        assert_eq!(connector.made.get(), 1);
        let counts = pool.counts();
        assert_eq!(
            (counts.connections, counts.connected, counts.reused),
            (1, 1, 9)
        );
    });
}

#[test]
fn concurrent_checkouts_share_one_attempt() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let tasks: Vec<_> = (0..50).map(|_| connector.spawn(&pool, "a")).collect();
        let mut tunnels = Vec::new();
        for task in tasks {
            tunnels.push(task.await.expect("task"));
        }
        assert_eq!(connector.made.get(), 1);
        assert_eq!(pool.counts().streams, 50);
    });
}

#[test]
fn demand_decides_how_many_connections_there_are() {
    run(async {
        let (pool, connector) = (TestPool::new(small(10)), Connector::default());
        let tasks: Vec<_> = (0..45).map(|_| connector.spawn(&pool, "a")).collect();
        let mut tunnels = Vec::new();
        for task in tasks {
            tunnels.push(task.await.expect("task"));
        }
        assert_eq!(connector.made.get(), 5);
        // Streams that end make room: a connection that was full is used again.
        tunnels.clear();
        for _ in 0..45 {
            tunnels.push(connector.checkout(&pool, "a").await);
        }
        assert_eq!(connector.made.get(), 5);
    });
}

#[test]
fn the_least_loaded_connection_is_chosen() {
    run(async {
        let (pool, connector) = (TestPool::new(small(4)), Connector::default());
        let mut tunnels = Vec::new();
        for _ in 0..8 {
            tunnels.push(connector.checkout(&pool, "a").await);
        }
        // The first connection has 1 stream left, the second one 4.
        tunnels.drain(..3);
        for _ in 0..3 {
            tunnels.push(connector.checkout(&pool, "a").await);
        }
        assert_eq!(connector.made.get(), 2, "all three found room on the first");
        assert_eq!(pool.counts().streams, 8);
    });
}

#[test]
fn the_peers_limit_counts() {
    run(async {
        let connector = Connector {
            settings: Settings {
                max_concurrent_streams: 3,
                ..Settings::DEFAULT
            },
            ..Connector::default()
        };
        let pool = TestPool::new(PoolSettings::default());
        let mut tunnels = Vec::new();
        for _ in 0..7 {
            tunnels.push(connector.checkout(&pool, "a").await);
        }
        assert_eq!(connector.made.get(), 3);
    });
}

#[test]
fn above_the_connection_limit_checkouts_wait_for_a_stream_to_end() {
    run(async {
        let settings = PoolSettings {
            max_streams: 1,
            max_connections: 1,
            ..PoolSettings::default()
        };
        let (pool, connector) = (TestPool::new(settings), Connector::default());
        let first = connector.checkout(&pool, "a").await;
        let deadline = Instant::now() + Duration::from_millis(20);
        let full = pool
            .checkout(&"a", &request(), deadline, async || {
                connector.connect().await
            })
            .await;
        assert!(matches!(full, Err(CheckoutError::Timeout)), "{full:?}");
        let second = connector.spawn(&pool, "a");
        tokio::task::yield_now().await;
        drop(first);
        soon("the second", second).await.expect("task");
        assert_eq!(connector.made.get(), 1);
    });
}

#[test]
fn keys_do_not_share_connections_nor_wait_for_each_other() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let stuck = {
            let pool = pool.clone();
            spawn_local(async move {
                pool.checkout(&"black hole", &request(), patience(), async || {
                    pending().await
                })
                .await
                .map(|_| ())
            })
        };
        tokio::task::yield_now().await;
        let _a = connector.checkout(&pool, "a").await;
        let _b = connector.checkout(&pool, "b").await;
        assert_eq!(connector.made.get(), 2);
        assert_eq!(pool.counts().attempts, 1);
        stuck.abort();
        let _ = stuck.await;
        assert_eq!(pool.counts().attempts, 0);
    });
}

#[test]
fn a_black_hole_fails_all_waiters_at_once_and_not_one_after_the_other() {
    run(async {
        let pool = TestPool::new(PoolSettings::default());
        let begin = Instant::now();
        let attempts = Rc::new(Cell::new(0));
        let tasks: Vec<_> = (0..20)
            .map(|_| {
                let (pool, attempts) = (pool.clone(), attempts.clone());
                spawn_local(async move {
                    let deadline = begin + Duration::from_millis(200);
                    let connect = async || {
                        attempts.set(attempts.get() + 1);
                        pending().await
                    };
                    pool.checkout(&"a", &request(), deadline, connect)
                        .await
                        .map(|_| ())
                })
            })
            .collect();
        for task in tasks {
            let error = task.await.expect("task").expect_err("black hole");
            assert!(matches!(error, CheckoutError::Timeout), "{error:?}");
            assert_eq!(error.retry(|_| Retry::Never), Retry::Elsewhere);
        }
        assert_eq!(attempts.get(), 1);
        assert!(
            begin.elapsed() < Duration::from_secs(2),
            "{:?}",
            begin.elapsed()
        );
    });
}

#[test]
fn waiters_get_the_error_of_the_attempt_they_waited_for() {
    run(async {
        let pool = TestPool::new(PoolSettings::default());
        let (go, attempts) = (Rc::new(Notify::new()), Rc::new(Cell::new(0)));
        let tasks: Vec<_> = (0..5)
            .map(|_| {
                let (pool, go, attempts) = (pool.clone(), go.clone(), attempts.clone());
                spawn_local(async move {
                    let connect = async || {
                        attempts.set(attempts.get() + 1);
                        go.notified().await;
                        Err(Refused)
                    };
                    pool.checkout(&"a", &request(), patience(), connect)
                        .await
                        .map(|_| ())
                })
            })
            .collect();
        eventually("an attempt", || attempts.get() == 1).await;
        go.notify_one();
        for task in tasks {
            let error = soon("the error", task)
                .await
                .expect("task")
                .expect_err("refused");
            assert!(matches!(error, CheckoutError::Connect(e) if *e == Refused));
        }
        assert_eq!(attempts.get(), 1);
        // The next one tries again.
        let connector = Connector::default();
        connector.checkout(&pool, "a").await;
        assert_eq!((pool.counts().failed, pool.counts().connected), (1, 1));
    });
}

#[test]
fn a_waiter_takes_over_when_its_leader_is_cancelled() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let leader = {
            let pool = pool.clone();
            spawn_local(async move {
                let _ = pool
                    .checkout(&"a", &request(), patience(), async || pending().await)
                    .await;
            })
        };
        eventually("an attempt", || pool.counts().attempts == 1).await;
        let waiter = connector.spawn(&pool, "a");
        tokio::task::yield_now().await;
        assert_eq!(connector.made.get(), 0);
        leader.abort();
        soon("the waiter", waiter).await.expect("task");
        assert_eq!(connector.made.get(), 1);
    });
}

#[test]
fn unused_connections_are_released_and_used_ones_are_not() {
    run(async {
        let settings = PoolSettings {
            unused_release: Duration::from_millis(100),
            sweep: Duration::from_millis(10),
            ..PoolSettings::default()
        };
        let (pool, connector) = (TestPool::new(settings), Connector::default());
        let kept = connector.checkout(&pool, "kept").await;
        drop(connector.checkout(&pool, "released").await);
        let unused = connector.servers.borrow_mut().pop().expect("its server");
        soon("release", unused.task)
            .await
            .expect("join")
            .expect("orderly");
        assert_eq!(pool.counts().released, 1);
        assert_eq!(pool.counts().connections, 1);
        drop(kept);
        eventually("all are released", || pool.counts().released == 2).await;
        // The sweeper has ended with the last one, and starts again.
        drop(connector.checkout(&pool, "kept").await);
        eventually("released again", || pool.counts().released == 3).await;
    });
}

#[test]
fn a_burst_leaves_no_surplus_connections() {
    run(async {
        let settings = PoolSettings {
            max_streams: 1,
            unused_release: Duration::from_millis(150),
            sweep: Duration::from_millis(10),
            ..PoolSettings::default()
        };
        let (pool, connector) = (TestPool::new(settings), Connector::default());
        let mut tunnels = Vec::new();
        for _ in 0..8 {
            tunnels.push(connector.checkout(&pool, "a").await);
        }
        tunnels.clear();
        // One at a time from now on, always in use: only the demand tells that one is enough.
        let deadline = patience();
        while pool.counts().connections > 1 {
            assert!(Instant::now() < deadline, "{:?}", pool.counts());
            let tunnel = connector.checkout(&pool, "a").await;
            tokio::time::sleep(Duration::from_millis(2)).await;
            drop(tunnel);
        }
        assert_eq!(connector.made.get(), 8);
    });
}

#[test]
fn evicted_connections_take_no_new_streams_and_keep_the_old_ones() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let mut old = connector.checkout(&pool, "gone").await;
        let _other = connector.checkout(&pool, "stays").await;
        assert_eq!(pool.evict(|key| *key == "gone"), 1);
        let _new = connector.checkout(&pool, "gone").await;
        let _same = connector.checkout(&pool, "stays").await;
        assert_eq!(connector.made.get(), 3);
        write(&mut old, "x").await;
        assert_eq!(read(&mut old, 1).await, b"x");
        drop(old);
        let server = connector.servers.borrow_mut().remove(0);
        soon("it closes", server.task)
            .await
            .expect("join")
            .expect("orderly");
        assert_eq!(pool.counts().evicted, 1);
    });
}

#[test]
fn an_attempt_that_is_evicted_under_way_is_not_kept() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let go = Rc::new(Notify::new());
        let leader = {
            let (pool, connector, go) = (pool.clone(), connector.clone(), go.clone());
            spawn_local(async move {
                let connect = async || {
                    go.notified().await;
                    connector.connect().await
                };
                let opened = pool.checkout(&"a", &request(), patience(), connect).await;
                opened.expect("checkout").0
            })
        };
        eventually("an attempt", || pool.counts().attempts == 1).await;
        let waiter = connector.spawn(&pool, "a");
        tokio::task::yield_now().await;
        pool.evict(|_| true);
        // The waiter does not use what was meant for the workload that is gone.
        let _waiter = soon("the waiter", waiter).await.expect("task");
        assert_eq!(connector.made.get(), 1);
        go.notify_one();
        let _leader = soon("the leader", leader).await.expect("task");
        assert_eq!((connector.made.get(), pool.counts().connections), (2, 1));
    });
}

#[test]
fn a_connection_that_died_in_the_pool_is_replaced_unseen() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        drop(connector.checkout(&pool, "a").await);
        // Its peer goes away, and the checkout comes before the client has noticed.
        let server = connector.servers.borrow_mut().remove(0);
        server.task.abort();
        let _ = server.task.await;
        let mut tunnel = connector.checkout(&pool, "a").await;
        write(&mut tunnel, "x").await;
        assert_eq!(read(&mut tunnel, 1).await, b"x");
        assert_eq!(connector.made.get(), 2);
    });
}

#[test]
fn a_peer_that_drains_gets_no_new_streams() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let mut old = connector.checkout(&pool, "a").await;
        let deadline = patience();
        connector.servers.borrow()[0]
            .drain
            .signal(DrainMode::Graceful { deadline });
        eventually("the client knows", || pool.counts().connections == 0).await;
        let _new = connector.checkout(&pool, "a").await;
        assert_eq!(connector.made.get(), 2);
        write(&mut old, "x").await;
        assert_eq!(read(&mut old, 1).await, b"x");
    });
}

#[test]
fn draining_waits_for_streams_and_refuses_new_checkouts() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let tunnel = connector.checkout(&pool, "a").await;
        let early = Instant::now() + Duration::from_millis(20);
        assert!(!pool.drain(early).await, "a stream is open");
        let refused = pool
            .checkout(&"a", &request(), patience(), async || {
                connector.connect().await
            })
            .await;
        assert!(matches!(refused, Err(CheckoutError::Draining)));
        drop(tunnel);
        let server = connector.servers.borrow_mut().remove(0);
        soon("it closes", server.task)
            .await
            .expect("join")
            .expect("orderly");

        let pool = TestPool::new(PoolSettings::default());
        drop(connector.checkout(&pool, "a").await);
        assert!(pool.drain(patience()).await);
    });
}

#[test]
fn a_refused_stream_is_the_callers_and_leaves_the_connection() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        for _ in 0..3 {
            let connect = async || {
                connector
                    .connect_with(async |incoming: Incoming| {
                        let status = http::StatusCode::UNAUTHORIZED;
                        incoming.respond.refuse(status, "http_request_denied");
                    })
                    .await
            };
            let refused = pool.checkout(&"a", &request(), patience(), connect).await;
            let error = refused.expect_err("refused");
            assert_eq!(error.retry(|_| Retry::Anywhere), Retry::Never, "{error:?}");
        }
        assert_eq!(connector.made.get(), 1);
        assert_eq!(pool.counts().streams, 0);
    });
}

/// A task is as large as its largest wait, for as long as it lives: a connection that has its
/// tunnel still carries the size of the checkout.
#[test]
fn a_checkout_is_small_although_handshakes_are_large() {
    run(async {
        let pool = TestPool::new(PoolSettings::default());
        let request = request();
        let large = [0_u8; 4096];
        let connect = async || {
            tokio::task::yield_now().await;
            std::hint::black_box(&large);
            Err(Refused)
        };
        let checkout = pool.checkout(&"a", &request, patience(), connect);
        let size = size_of_val(&checkout);
        assert!(size <= 1024, "{size} bytes");
        println!("{size} bytes");
        drop(checkout);
        let connector = Connector::default();
        let connection = connector.connect().await.expect("connection");
        let size = size_of_val(&connection.open(&request, patience()));
        println!("open: {size} bytes");
        assert!(size <= 768, "{size} bytes");
    });
}

#[test]
fn a_new_connection_whose_peer_drains_at_once_is_replaced() {
    run(async {
        // As when another process takes over from the one that was connected to.
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let connect = async || {
            let connection = connector.connect().await?;
            if connector.made.get() == 1 {
                let server = connector.servers.borrow_mut().remove(0);
                let deadline = patience();
                server.drain.signal(DrainMode::Graceful { deadline });
                server.task.abort();
                let _ = server.task.await;
            }
            Ok(connection)
        };
        let opened = pool.checkout(&"a", &request(), patience(), connect).await;
        let mut tunnel = opened.expect("checkout").0;
        write(&mut tunnel, "x").await;
        assert_eq!(read(&mut tunnel, 1).await, b"x");
        assert_eq!(connector.made.get(), 2);
    });
}

#[test]
fn a_peer_that_closes_each_new_connection_is_not_asked_for_ever() {
    run(async {
        let (pool, connector) = (TestPool::new(PoolSettings::default()), Connector::default());
        let connect = async || {
            let connection = connector.connect().await?;
            let server = connector.servers.borrow_mut().remove(0);
            server.task.abort();
            let _ = server.task.await;
            Ok(connection)
        };
        let opened = pool.checkout(&"a", &request(), patience(), connect).await;
        assert!(matches!(opened, Err(CheckoutError::Open(_))), "{opened:?}");
        assert_eq!(connector.made.get(), 3);
    });
}
