//! Streams of one connection: data, flow control, half-close, resets, refusals, the end.

#[path = "support/hbone.rs"]
mod support;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use adit_shared::hbone::{
    Baggage, BaggageFields, ConnectRequest, Connection, ConnectionError, Forwarded, OpenError,
    ResetReason, Retry, Settings, Traceparent, Tunnel, TunnelError,
};
use adit_shared::net::drain::DrainMode;
use bytes::Bytes;
use http::StatusCode;
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

#[test]
fn many_streams_carry_their_own_bytes() {
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, echo).await;
        let mut tasks = Vec::new();
        for i in 0..100_u8 {
            let connection = connection.clone();
            tasks.push(tokio::task::spawn_local(async move {
                let mut tunnel = open(&connection).await;
                for len in [1, 100, 20_000] {
                    write(&mut tunnel, vec![i; len]).await;
                    assert_eq!(read(&mut tunnel, len).await, vec![i; len]);
                }
                tunnel.finish().expect("finish");
                assert!(read(&mut tunnel, 1).await.is_empty());
            }));
        }
        for task in tasks {
            task.await.expect("the stream's task");
        }
        assert_eq!(connection.live_streams(), 0);
    });
}

#[test]
fn bulk_passes_in_both_directions_at_once() {
    const TOTAL: usize = 24 << 20;
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, echo).await;
        let mut tunnel = open(&connection).await;
        let chunk = Bytes::from(vec![7; 1 << 20]);
        let (mut sent, mut received) = (0, 0);
        let mut unsent = Bytes::new();
        poll_fn(|cx| {
            loop {
                let mut idle = true;
                if sent < TOTAL || !unsent.is_empty() {
                    if unsent.is_empty() {
                        unsent = chunk.clone();
                        sent += unsent.len();
                    }
                    if let Poll::Ready(n) = tunnel.poll_capacity(cx, unsent.len()) {
                        let n = n.expect("capacity").min(unsent.len());
                        tunnel.send(unsent.split_to(n)).expect("send");
                        idle = false;
                    }
                }
                if let Poll::Ready(chunk) = tunnel.poll_read_chunk(cx) {
                    let chunk = chunk.expect("read").expect("no end yet");
                    assert!(chunk.iter().all(|b| *b == 7));
                    tunnel.release(chunk.len());
                    received += chunk.len();
                    idle = false;
                }
                if received == TOTAL {
                    return Poll::Ready(());
                }
                if idle {
                    return Poll::Pending;
                }
            }
        })
        .await;
    });
}

#[test]
fn a_full_turn_travels_as_one_frame() {
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, async |incoming| {
            let mut tunnel = incoming.respond.accept(None).expect("accept");
            let chunk = soon("the chunk", tunnel.read_chunk()).await;
            let len = chunk.expect("read").expect("a chunk").len();
            write(&mut tunnel, len.to_string()).await;
            let _ = tunnel.read_chunk().await;
        })
        .await;
        // The peer's SETTINGS, which allow the large frame, come before its answer.
        let mut tunnel = open(&connection).await;
        write(&mut tunnel, vec![0; 1 << 20]).await;
        assert_eq!(read(&mut tunnel, 7).await, b"1048576");
    });
}

#[test]
fn a_stalled_reader_stops_its_writer_and_no_other_stream() {
    run(async {
        let settings = Settings::DEFAULT;
        let stalled: Rc<RefCell<Option<Tunnel>>> = Rc::default();
        let keep = stalled.clone();
        let (connection, _server) = connect(settings, async move |incoming| {
            if incoming.request.authority.port() == 1 {
                let tunnel = incoming.respond.accept(None).expect("accept");
                keep.replace(Some(tunnel));
            } else {
                echo(incoming).await;
            }
        })
        .await;
        let stall = ConnectRequest::new("10.0.0.5:1".parse::<std::net::SocketAddr>().expect("ip"));
        let (mut blocked, _) = connection.open(&stall, patience()).await.expect("opens");
        // Exactly the window is taken, then nothing more.
        let window = settings.stream_window as usize;
        let mut taken = 0;
        while taken < window {
            let n = poll_fn(|cx| blocked.poll_capacity(cx, 1 << 20)).await;
            let n = n.expect("capacity");
            blocked.send(Bytes::from(vec![0; n])).expect("send");
            taken += n;
        }
        assert_eq!(taken, window);
        let more = blocked.write_chunk(Bytes::from_static(b"x"));
        tokio::pin!(more);
        let mut other = open(&connection).await;
        for _ in 0..8 {
            write(&mut other, vec![1; 1 << 20]).await;
            assert_eq!(read(&mut other, 1 << 20).await.len(), 1 << 20);
        }
        let polled = poll_fn(|cx| Poll::Ready(more.as_mut().poll(cx).is_pending())).await;
        assert!(polled, "the blocked stream is still blocked");
        // When its reader goes on, so does it.
        let reader = tokio::task::spawn_local(async move {
            let mut tunnel = stalled.take().expect("accepted");
            read(&mut tunnel, window + 1).await.len()
        });
        soon("unblocking", more).await.expect("write");
        assert_eq!(reader.await.expect("reader"), window + 1);
    });
}

/// Writes to `count` streams that nobody reads until none of them takes more, and tells how much
/// that is in all.
async fn stall(connection: &Connection, count: usize) -> (Vec<JoinHandle<()>>, Rc<Cell<usize>>) {
    let stall = ConnectRequest::new("10.0.0.5:1".parse::<std::net::SocketAddr>().expect("ip"));
    let taken = Rc::new(Cell::new(0));
    let mut writers = Vec::new();
    for _ in 0..count {
        let (mut blocked, _) = connection.open(&stall, patience()).await.expect("opens");
        let taken = taken.clone();
        writers.push(tokio::task::spawn_local(async move {
            loop {
                let n = poll_fn(|cx| blocked.poll_capacity(cx, 1 << 20)).await;
                let n = n.expect("capacity");
                blocked.send(Bytes::from(vec![0; n])).expect("send");
                taken.set(taken.get() + n);
            }
        }));
    }
    (writers, taken)
}

/// After so long without progress nothing is under way.
const STALLED: Duration = Duration::from_secs(1);

/// Four of them would hold the whole window of the connection.
#[test]
fn stalled_uploads_do_not_starve_other_streams_and_hold_no_more_than_is_bounded() {
    const MAX_HELD: usize = (16 << 20) + 200 * (256 << 10);
    for count in [4, 8, 150] {
        run(async {
            let kept: Rc<RefCell<Vec<Tunnel>>> = Rc::default();
            let keep = kept.clone();
            let (connection, _server) = connect(Settings::DEFAULT, async move |incoming| {
                if incoming.request.authority.port() == 1 {
                    let tunnel = incoming.respond.accept(None).expect("accept");
                    keep.borrow_mut().push(tunnel);
                } else {
                    echo(incoming).await;
                }
            })
            .await;
            let (writers, taken) = stall(&connection, count).await;
            // All of the window, or half of it where this side is so slow that the other one has
            // made the windows smaller meanwhile.
            let (mut last, mut since) = (0, Instant::now());
            eventually("no stream takes more", || {
                if taken.get() != last {
                    (last, since) = (taken.get(), Instant::now());
                }
                last >= 16 << 20 || last >= 8 << 20 && since.elapsed() > STALLED
            })
            .await;
            let mut other = open(&connection).await;
            for _ in 0..8 {
                write(&mut other, vec![1; 1 << 20]).await;
                assert_eq!(read(&mut other, 1 << 20).await.len(), 1 << 20);
            }
            assert!(taken.get() <= MAX_HELD, "{count} hold {}", taken.get());
            // They go on when they are read.
            let tunnels = kept.take();
            for mut tunnel in tunnels {
                assert!(!read(&mut tunnel, 1 << 20).await.is_empty());
            }
            writers.iter().for_each(JoinHandle::abort);
        });
    }
}

/// The same the other way: a client's app that does not read its downloads.
#[test]
fn stalled_downloads_do_not_starve_other_streams() {
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, async |incoming| {
            if incoming.request.authority.port() != 1 {
                return echo(incoming).await;
            }
            let mut tunnel = incoming.respond.accept(None).expect("accept");
            let chunk = Bytes::from(vec![0; 1 << 20]);
            while tunnel.write_chunk(chunk.clone()).await.is_ok() {}
        })
        .await;
        let stall = ConnectRequest::new("10.0.0.5:1".parse::<std::net::SocketAddr>().expect("ip"));
        let mut blocked = Vec::new();
        for _ in 0..6 {
            let (tunnel, _) = connection.open(&stall, patience()).await.expect("opens");
            blocked.push(tunnel);
        }
        let mut other = open(&connection).await;
        for _ in 0..32 {
            write(&mut other, vec![1; 1 << 20]).await;
            assert_eq!(read(&mut other, 1 << 20).await.len(), 1 << 20);
        }
        for mut tunnel in blocked {
            assert_eq!(read(&mut tunnel, 8 << 20).await.len() >> 20, 8);
        }
    });
}

#[test]
fn each_side_may_finish_first_and_the_other_goes_on() {
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, async |incoming| {
            let server_first = incoming.request.authority.port() == 1;
            let mut tunnel = incoming.respond.accept(None).expect("accept");
            if server_first {
                tunnel.finish().expect("finish");
                assert_eq!(read(&mut tunnel, 100).await, b"late");
            } else {
                assert_eq!(read(&mut tunnel, 100).await, b"early");
                write(&mut tunnel, "answer").await;
                tunnel.finish().expect("finish");
            }
        })
        .await;
        let mut client_first = open(&connection).await;
        write(&mut client_first, "early").await;
        client_first.finish().expect("finish");
        assert!(matches!(client_first.finish(), Err(TunnelError::Finished)));
        assert_eq!(read(&mut client_first, 100).await, b"answer");

        let to = ConnectRequest::new("10.0.0.5:1".parse::<std::net::SocketAddr>().expect("ip"));
        let (mut server_first, _) = connection.open(&to, patience()).await.expect("opens");
        assert!(read(&mut server_first, 1).await.is_empty());
        write(&mut server_first, "late").await;
        server_first.finish().expect("finish");
    });
}

#[test]
fn a_reset_arrives_as_a_reset_with_its_reason() {
    run(async {
        let seen = Rc::new(RefCell::new(None));
        let told = Rc::new(Notify::new());
        let (keep, tell) = (seen.clone(), told.clone());
        let (connection, _server) = connect(Settings::DEFAULT, async move |incoming| {
            let by_server = incoming.request.authority.port() == 1;
            let mut tunnel = incoming.respond.accept(None).expect("accept");
            if by_server {
                // A reset overtakes what is queued, the 200 included.
                assert_eq!(read(&mut tunnel, 1).await, b"x");
                tunnel.reset(ResetReason::CONNECT_ERROR);
            } else {
                keep.replace(Some(tunnel.read_chunk().await));
                tell.notify_one();
            }
        })
        .await;
        let to = ConnectRequest::new("10.0.0.5:1".parse::<std::net::SocketAddr>().expect("ip"));
        let (mut by_server, _) = connection.open(&to, patience()).await.expect("opens");
        write(&mut by_server, "x").await;
        let end = soon("reset", by_server.read_chunk()).await;
        assert!(matches!(
            end,
            Err(TunnelError::Reset(ResetReason::CONNECT_ERROR))
        ));
        let end = by_server.write_chunk(Bytes::from_static(b"x")).await;
        assert!(matches!(
            end,
            Err(TunnelError::Reset(ResetReason::CONNECT_ERROR))
        ));

        let mut by_client = open(&connection).await;
        by_client.reset(ResetReason::CONNECT_ERROR);
        soon("reset", told.notified()).await;
        let end = seen.take();
        assert!(
            matches!(
                end,
                Some(Err(TunnelError::Reset(ResetReason::CONNECT_ERROR)))
            ),
            "{end:?}"
        );

        // A tunnel that is dropped in the middle is not a finished one.
        drop(open(&connection).await);
        soon("reset", told.notified()).await;
        let end = seen.take();
        assert!(
            matches!(end, Some(Err(TunnelError::Reset(ResetReason::CANCEL)))),
            "{end:?}"
        );
    });
}

#[test]
fn a_silent_side_sees_the_reset_too() {
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, async |incoming| {
            let mut tunnel = incoming.respond.accept(None).expect("accept");
            tunnel.finish().expect("finish");
            assert!(read(&mut tunnel, 1).await == b"x");
            tunnel.reset(ResetReason::CONNECT_ERROR);
        })
        .await;
        let mut tunnel = open(&connection).await;
        assert!(read(&mut tunnel, 1).await.is_empty());
        write(&mut tunnel, "x").await;
        let reset = soon("reset", poll_fn(|cx| tunnel.poll_reset(cx))).await;
        assert!(matches!(
            reset,
            TunnelError::Reset(ResetReason::CONNECT_ERROR)
        ));
    });
}

#[test]
fn a_refusal_carries_its_status_and_says_where_to_try_again() {
    let cases = [
        (StatusCode::BAD_REQUEST, "http_request_error", Retry::Never),
        (
            StatusCode::UNAUTHORIZED,
            "http_request_denied",
            Retry::Never,
        ),
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "connection_refused",
            Retry::Elsewhere,
        ),
        (StatusCode::SERVICE_UNAVAILABLE, "", Retry::Elsewhere),
    ];
    run(async {
        for (status, error, retry) in cases {
            let (connection, _server) = connect(Settings::DEFAULT, async move |incoming| {
                incoming.respond.refuse(status, error);
            })
            .await;
            let refused = connection.open(&request(), patience()).await;
            let refused = refused.expect_err("refused");
            assert_eq!(refused.retry(), retry);
            let OpenError::Refused {
                status: seen,
                detail,
            } = refused
            else {
                panic!("{refused}");
            };
            assert_eq!(seen, status);
            assert_eq!(detail.as_deref().unwrap_or_default(), error);
            assert_eq!(connection.live_streams(), 0);
            assert!(connection.is_usable());
        }
    });
}

#[test]
fn refusing_by_reset_is_told_apart_from_failing() {
    run(async {
        for (reason, retry) in [
            (ResetReason::REFUSED_STREAM, Retry::Anywhere),
            (ResetReason::INTERNAL_ERROR, Retry::Elsewhere),
        ] {
            let (connection, _server) = connect(Settings::DEFAULT, async move |incoming| {
                incoming.respond.reset(reason);
            })
            .await;
            let error = connection.open(&request(), patience()).await;
            let error = error.expect_err("reset");
            assert!(
                matches!(error, OpenError::Reset(seen) if seen == reason),
                "{error}"
            );
            assert_eq!(error.retry(), retry);
        }
    });
}

#[test]
fn what_both_sides_say_arrives() {
    run(async {
        let destination = Baggage::new(BaggageFields {
            service_name: "destination".into(),
            ..BaggageFields::default()
        });
        let asked = ConnectRequest {
            authority: support::destination(),
            forwarded: Some(Forwarded {
                source: "10.1.2.3:4567".parse().expect("address"),
                host: Some("svc.ns".parse().expect("name")),
                principal: None,
            }),
            baggage: Some(Baggage::new(BaggageFields {
                service_name: "source".into(),
                ..BaggageFields::default()
            })),
            traceparent: Some(Traceparent::random()),
        };
        let (expected, answer) = (asked.clone(), destination.clone());
        let (connection, _server) = connect(Settings::DEFAULT, async move |incoming| {
            assert_eq!(incoming.request, expected);
            assert!(incoming.ignored.is_empty());
            let mut tunnel = incoming.respond.accept(Some(&answer)).expect("accept");
            tunnel.finish().expect("finish");
            let _ = tunnel.read_chunk().await;
        })
        .await;
        // Twice: the second time the baggage is recognised rather than parsed.
        for _ in 0..2 {
            let (_tunnel, info) = connection.open(&asked, patience()).await.expect("opens");
            assert_eq!(info.baggage, Some(destination.clone()));
        }
    });
}

#[test]
fn an_answer_that_does_not_come_is_a_timeout_and_the_server_learns_of_it() {
    run(async {
        let cancelled = Rc::new(Notify::new());
        let told = cancelled.clone();
        let (connection, _server) = connect(Settings::DEFAULT, async move |mut incoming| {
            incoming.respond.cancelled().await;
            told.notify_one();
        })
        .await;
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = connection
            .open(&request(), deadline)
            .await
            .expect_err("timeout");
        assert!(matches!(error, OpenError::Timeout));
        soon("cancellation", cancelled.notified()).await;
        assert_eq!(connection.live_streams(), 0);
    });
}

#[test]
fn a_graceful_drain_lets_streams_finish_and_takes_no_new_ones() {
    run(async {
        let (connection, server) = connect(Settings::DEFAULT, echo).await;
        let mut tunnel = open(&connection).await;
        let deadline = patience();
        server.drain.signal(DrainMode::Graceful { deadline });
        eventually("the client knows", || !connection.is_usable()).await;
        let error = connection
            .open(&request(), patience())
            .await
            .expect_err("draining");
        assert!(
            matches!(&error, OpenError::Connection(ConnectionError::GoAway { reason, .. })
                if *reason == ResetReason::NO_ERROR),
            "{error}"
        );
        assert_eq!(error.retry(), Retry::Anywhere);
        write(&mut tunnel, "still works").await;
        assert_eq!(read(&mut tunnel, 11).await, b"still works");
        tunnel.finish().expect("finish");
        assert!(read(&mut tunnel, 1).await.is_empty());
        drop(tunnel);
        let served = soon("the end", server.task)
            .await
            .expect("join")
            .expect("orderly");
        assert_eq!(served.accepted, 1);
    });
}

#[test]
fn a_drain_ends_at_its_deadline() {
    run(async {
        let (connection, server) = connect(Settings::DEFAULT, echo).await;
        let mut tunnel = open(&connection).await;
        let deadline = Instant::now() + Duration::from_millis(50);
        server.drain.signal(DrainMode::Graceful { deadline });
        let end = soon("the end", tunnel.read_chunk()).await;
        assert!(matches!(end, Err(TunnelError::Connection(_))), "{end:?}");
        assert!(Instant::now() >= deadline);
        soon("the end", server.task)
            .await
            .expect("join")
            .expect("orderly");
        soon("the client's end", connection.closed()).await;
    });
}

#[test]
fn an_immediate_drain_waits_for_nothing() {
    run(async {
        let (connection, server) = connect(Settings::DEFAULT, echo).await;
        let mut tunnel = open(&connection).await;
        server.drain.signal(DrainMode::Graceful {
            deadline: patience(),
        });
        eventually("the client knows", || !connection.is_usable()).await;
        server.drain.signal(DrainMode::Immediate);
        let end = soon("the end", tunnel.read_chunk()).await;
        assert!(matches!(end, Err(TunnelError::Connection(_))), "{end:?}");
        soon("the end", server.task)
            .await
            .expect("join")
            .expect("orderly");
    });
}

#[test]
fn a_lost_connection_fails_its_streams_and_is_named() {
    run(async {
        let (client, server) = sockets().await;
        let server = start(server, Settings::DEFAULT, echo);
        let connection = adit_shared::hbone::Connection::handshake(client, &Settings::DEFAULT)
            .await
            .expect("handshake");
        let mut tunnel = open(&connection).await;
        server.task.abort();
        let end = soon("the end", tunnel.read_chunk()).await;
        assert!(matches!(end, Err(TunnelError::Connection(_))), "{end:?}");
        soon("the connection's end", connection.closed()).await;
        assert!(!connection.is_usable());
        let error = connection
            .open(&request(), patience())
            .await
            .expect_err("gone");
        assert_eq!(error.retry(), Retry::Anywhere, "{error}");
    });
}

#[test]
fn the_last_handle_closes_the_connection_but_not_under_a_tunnel() {
    run(async {
        let (connection, server) = connect(Settings::DEFAULT, echo).await;
        let mut tunnel = open(&connection).await;
        drop(connection);
        write(&mut tunnel, "x").await;
        assert_eq!(read(&mut tunnel, 1).await, b"x");
        drop(tunnel);
        let served = soon("the end", server.task)
            .await
            .expect("join")
            .expect("orderly");
        assert_eq!(served.accepted, 1);
    });
}

#[test]
fn a_tunnel_can_be_a_byte_stream() {
    run(async {
        let (connection, _server) = connect(Settings::DEFAULT, echo).await;
        let mut io = open(&connection).await.into_io();
        io.write_all(&[3; 100_000]).await.expect("write");
        let mut back = vec![0; 100_000];
        soon("echo", io.read_exact(&mut back)).await.expect("read");
        assert!(back.iter().all(|b| *b == 3));
        io.shutdown().await.expect("shutdown");
        assert_eq!(io.read(&mut back).await.expect("end"), 0);
    });
}

#[test]
fn live_streams_are_counted_while_they_are_opened_too() {
    run(async {
        let go = Rc::new(Notify::new());
        let held = Rc::new(Cell::new(0));
        let (wait, count) = (go.clone(), held.clone());
        let (connection, _server) = connect(Settings::DEFAULT, async move |incoming| {
            count.set(count.get() + 1);
            wait.notified().await;
            echo(incoming).await;
        })
        .await;
        let opening = {
            let connection = connection.clone();
            tokio::task::spawn_local(async move { open(&connection).await })
        };
        eventually("it is under way", || held.get() == 1).await;
        assert_eq!(connection.live_streams(), 1);
        assert!(connection.idle_since().is_none());
        go.notify_one();
        let tunnel = opening.await.expect("opened");
        assert_eq!(connection.live_streams(), 1);
        drop(tunnel);
        assert_eq!(connection.live_streams(), 0);
        assert!(connection.idle_since().is_some());
    });
}
