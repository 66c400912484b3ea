//! The measurements: contenders take turns, so that what slows the machine down slows all of
//! them down.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::contender::{Contender, Proxies, Proxy, Way, aim, verify};
use super::ground::{Ground, OTHER_CORE, empty};
use super::report::{Report, Round, Row, Table};
use super::scenario::{Scenario, all};
use super::setup::{SECURE, Setup, WEB};
use super::spec::{LoadResult, LoadSpec, Protocol};
use super::{envoy, peers, waypoint};
use crate::bench::Options;
use crate::bench::usage::{Used, memory};

/// Changes of the configuration per second.
const CHANGES: u64 = 100;
/// No line of an access log is shorter.
const SHORTEST_LINE: u64 = 60;
/// What a proxy may hold back of its log.
const BUFFERED: u64 = 256 << 10;
/// Length of loads that are not measured.
const WARM_UP: f64 = 0.7;

/// Runs everything; says on standard error what it does.
///
/// # Errors
/// Whatever did not run. A proxy that is not there, or does not do what the others do, and
/// missed limits, are in the report.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let begin = Instant::now();
    let ground = Ground::new()?;
    let wanted: Vec<Scenario> = all()
        .into_iter()
        .filter(|scenario| options.wants(&format!("L7 {}", scenario.name)))
        .collect();
    let mut tables = Vec::new();
    for scenarios in wanted.chunk_by(|a, b| a.setup == b.setup) {
        let setup = scenarios[0].setup;
        let contenders: Vec<Contender> = scenarios
            .iter()
            .flat_map(|scenario| scenario.contenders)
            .copied()
            .collect();
        let stage = Stage {
            proxies: Proxies::start(&ground, setup, &contenders),
            ground: &ground,
            setup,
            seconds: options.seconds as f64,
            rounds: options.rounds,
            verified: Mutex::default(),
        };
        for scenario in scenarios {
            eprintln!("bench: L7: {}", scenario.name);
            let table = stage.measure(scenario)?;
            eprintln!("{}", table.text());
            tables.push(table);
        }
    }
    Ok(Report {
        tables,
        rounds: options.rounds,
        seconds: options.seconds,
        took_seconds: begin.elapsed().as_secs_f64(),
    })
}

/// Keeps a thread off the proxies' core.
fn on_other_core() -> anyhow::Result<()> {
    let mut other = CpuSet::new();
    other.set(OTHER_CORE)?;
    sched_setaffinity(Pid::from_raw(0), &other).context("a core for the load")
}

/// Proxies of one setup, ready to be measured.
struct Stage<'a> {
    ground: &'a Ground,
    proxies: Proxies,
    setup: Setup,
    seconds: f64,
    rounds: usize,
    verified: Mutex<HashMap<Contender, Option<String>>>,
}

impl Stage<'_> {
    fn measure(&self, scenario: &Scenario) -> anyhow::Result<Table> {
        let load = LoadSpec {
            target: ([0, 0, 0, 0], 0).into(),
            hbone: None,
            protocol: scenario.protocol,
            connections: scenario.connections,
            streams: scenario.streams,
            host: String::new(),
            routes: self.setup.routes,
            body: scenario.body,
            seconds: self.seconds,
            rate: None,
        };
        let mut rows: Vec<Row> = scenario
            .contenders
            .iter()
            .map(|contender| Row::new(*contender))
            .collect();
        let mut rates = HashMap::new();
        for row in &mut rows {
            if let Err(error) = self.warm_up(row.contender, &load) {
                row.missing = Some(format!("{error:#}"));
                continue;
            }
            row.unlike = self.unlike(row.contender, scenario.protocol);
        }
        if scenario.open_loop {
            for way in [Way::Plain, Way::In, Way::Both] {
                let envoy = Contender::new(Proxy::Envoy, way);
                let load = LoadSpec {
                    seconds: self.seconds.min(2.0),
                    ..load.clone()
                };
                // Without Envoy there is nothing to compare with.
                if let Ok((result, _)) = self.load(envoy, &load, false) {
                    rates.insert(way, result.requests as f64 / result.seconds / 2.0);
                }
            }
        }
        for _ in 0..self.rounds {
            for row in rows.iter_mut().filter(|row| row.missing.is_none()) {
                let rate = rates.get(&row.contender.way).copied();
                if scenario.open_loop && rate.is_none() {
                    row.missing = Some("Envoy's rate is not known".into());
                    continue;
                }
                let load = LoadSpec {
                    rate,
                    ..load.clone()
                };
                match self.load(row.contender, &load, scenario.churn) {
                    Ok((result, used)) => {
                        if !self.has_logged(row.contender, result.requests) {
                            row.unlike = Some("it writes no access log".into());
                        }
                        row.rounds.push(Round::new(result, &used));
                    }
                    Err(error) => row.missing = Some(format!("{error:#}")),
                }
                if let Ok(process) = self.proxies.process(row.contender) {
                    // A process that has ended has no memory, and a row that says so.
                    row.memory = memory(process.pid()).ok();
                }
            }
        }
        Ok(Table {
            scenario: scenario.clone(),
            rows,
        })
    }

    fn warm_up(&self, contender: Contender, load: &LoadSpec) -> anyhow::Result<()> {
        let process = self.proxies.process(contender)?;
        let load = LoadSpec {
            seconds: WARM_UP,
            ..load.clone()
        };
        // The first connections may come before the configuration has.
        let mut loaded = Ok(());
        let waited = process.wait("answers", || {
            loaded = self.load(contender, &load, false).map(|_| ());
            loaded.is_ok()
        });
        loaded.and(waited)
    }

    fn verified(&self) -> MutexGuard<'_, HashMap<Contender, Option<String>>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a contender does differently; looked at once.
    fn unlike(&self, contender: Contender, protocol: Protocol) -> Option<String> {
        let known = self.verified().get(&contender).cloned();
        known.unwrap_or_else(|| {
            let verified = verify(self.ground, &self.proxies, contender, self.setup, protocol);
            let unlike = verified.err().map(|error| format!("{error:#}"));
            self.verified().insert(contender, unlike.clone());
            unlike
        })
    }

    fn load(
        &self,
        contender: Contender,
        load: &LoadSpec,
        churn: bool,
    ) -> anyhow::Result<(LoadResult, Used)> {
        let process = self.proxies.process(contender)?;
        let log = self.log_of(contender);
        if log.exists() {
            empty(&log)?;
        }
        let aimed = aim(self.ground, contender, load);
        let pids = [process.pid()];
        if !churn {
            return self.ground.load(&aimed, &pids);
        }
        let stop = AtomicBool::new(false);
        static NEXT: AtomicU64 = AtomicU64::new(1);
        thread::scope(|scope| {
            let changing = scope.spawn(|| -> anyhow::Result<()> {
                on_other_core()?;
                let begin = Instant::now();
                for index in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let number = NEXT.fetch_add(1, Ordering::Relaxed);
                    self.change(contender, number)?;
                    let due = begin + Duration::from_millis(index * 1000 / CHANGES);
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                Ok(())
            });
            let loaded = self.ground.load(&aimed, &pids);
            stop.store(true, Ordering::Relaxed);
            // A panic there is a panic here.
            let changed = changing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            changed.context("changing the configuration")?;
            loaded
        })
    }

    /// Where a contender's access log goes.
    fn log_of(&self, contender: Contender) -> PathBuf {
        self.ground.path(match (contender.proxy, contender.way) {
            (Proxy::Nginx, _) => peers::NGINX_LOG,
            (Proxy::Haproxy, _) => "haproxy.log",
            (Proxy::Envoy, Way::Plain) => envoy::PLAIN_LOG,
            (Proxy::Envoy, _) => envoy::WAYPOINT_LOG,
            (Proxy::Adit, _) => "waypoint.log",
        })
    }

    /// Whether the log of a load is there, except for what may still be buffered.
    fn has_logged(&self, contender: Contender, requests: u64) -> bool {
        let size = std::fs::metadata(self.log_of(contender)).map_or(0, |log| log.len());
        size + BUFFERED >= requests * SHORTEST_LINE
    }

    fn change(&self, contender: Contender, number: u64) -> anyhow::Result<()> {
        match contender.proxy {
            Proxy::Adit => waypoint::write_routes(self.ground, self.setup, number),
            _ if contender.way == Way::Both => {
                envoy::write_routes(self.ground, self.setup, SECURE, number)
            }
            _ => envoy::write_routes(self.ground, self.setup, WEB, number),
        }
    }
}
