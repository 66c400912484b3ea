//! CPU time and memory, from `/proc`: the figures that hold on a noisy machine.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

/// CPU time of a process, microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Cpu {
    pub(super) user: f64,
    pub(super) system: f64,
}

impl Cpu {
    pub(super) fn total(self) -> f64 {
        self.user + self.system
    }

    pub(super) fn map(self, change: impl Fn(f64) -> f64) -> Self {
        Self {
            user: change(self.user),
            system: change(self.system),
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            user: self.user - earlier.user,
            system: self.system - earlier.system,
        }
    }
}

/// Resident memory of a process, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Memory {
    pub(super) resident: u64,
    pub(super) peak: u64,
}

pub(super) fn memory(pid: u32) -> anyhow::Result<Memory> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kib.map(|kib| kib * 1024)
            .with_context(|| format!("{path}: {name}"))
    };
    Ok(Memory {
        resident: field("VmRSS:")?,
        peak: field("VmHWM:")?,
    })
}

/// A window of time in which the CPU use of the proxies, and of processes that are not ours,
/// is counted.
pub(super) struct Window<'a> {
    pids: &'a [u32],
    begin: Instant,
    proxies: Vec<Cpu>,
    machine: Machine,
}

/// What was counted in a [`Window`].
#[derive(Debug, Clone)]
pub(super) struct Used {
    pub(super) proxies: Vec<Cpu>,
    /// Share of the machine that others took, 0 to 1.
    pub(super) foreign: f64,
    pub(super) took: Duration,
}

impl<'a> Window<'a> {
    pub(super) fn open(pids: &'a [u32]) -> anyhow::Result<Self> {
        let machine = Machine::now()?;
        Ok(Self {
            pids,
            machine,
            proxies: cpu_of(pids)?,
            begin: Instant::now(),
        })
    }

    pub(super) fn close(self) -> anyhow::Result<Used> {
        let took = self.begin.elapsed();
        let proxies = cpu_of(self.pids)?;
        let machine = Machine::now()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let foreign = machine
            .foreign_ticks
            .saturating_sub(self.machine.foreign_ticks);
        let capacity = took.as_secs_f64() * cores;
        Ok(Used {
            proxies: proxies
                .iter()
                .zip(&self.proxies)
                .map(|(after, before)| after.since(*before))
                .collect(),
            foreign: (foreign as f64 * tick_us() / 1e6 / capacity).min(1.0),
            took,
        })
    }
}

fn cpu_of(pids: &[u32]) -> anyhow::Result<Vec<Cpu>> {
    pids.iter()
        .map(|pid| {
            let stat = Stat::read(*pid).with_context(|| format!("process {pid} is gone"))?;
            Ok(Cpu {
                user: stat.user as f64 * tick_us(),
                system: stat.system as f64 * tick_us(),
            })
        })
        .collect()
}

fn tick_us() -> f64 {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    1e6 / per_second as f64
}

/// The parts of `/proc/<pid>/stat` that are used (proc_pid_stat(5)), in clock ticks.
struct Stat {
    parent: u32,
    user: u64,
    system: u64,
    /// Of children that ended.
    children: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name may hold anything, also parentheses and spaces.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        Some(Self {
            parent: number(1)?.try_into().ok()?,
            user: number(11)?,
            system: number(12)?,
            children: number(13)? + number(14)?,
        })
    }
}

/// What the rest of the machine has used until now.
struct Machine {
    foreign_ticks: u64,
}

impl Machine {
    /// The time of every process that is neither a kernel thread nor descends from this one,
    /// with that of their children that have ended, and what the hypervisor took away.
    fn now() -> anyhow::Result<Self> {
        let mut all = HashMap::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            // Those that end just now are counted by their parents.
            if let Some(stat) = Stat::read(pid) {
                all.insert(pid, stat);
            }
        }
        let own = std::process::id();
        let ours = |mut pid: u32| {
            // A chain of parents that is longer than there are processes would be a circle.
            for _ in 0..all.len() {
                match pid {
                    0 => return false,
                    // 2: kernel threads work for everybody, here mostly for us.
                    2 => return true,
                    _ if pid == own => return true,
                    _ => pid = all.get(&pid).map_or(0, |stat| stat.parent),
                }
            }
            false
        };
        let foreign = all.iter().filter(|(pid, _)| !ours(**pid));
        let used: u64 = foreign
            .map(|(_, stat)| stat.user + stat.system + stat.children)
            .sum();
        let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let stolen = stat
            .lines()
            .next()
            .and_then(|line| line.split_whitespace().nth(8)?.parse::<u64>().ok())
            .unwrap_or(0);
        Ok(Self {
            foreign_ticks: used + stolen,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_behind_any_name() {
        let line = "42 (a) b (c)) S 7 42 42 0 -1 4194560 1 2 3 4 100 50 20 10 20 0 1 0 5";
        let stat = Stat::parse(line).expect("a stat line");
        assert_eq!(
            (stat.parent, stat.user, stat.system, stat.children),
            (7, 100, 50, 30)
        );
    }

    #[test]
    fn own_work_is_counted_and_not_foreign() {
        let own = [std::process::id()];
        let window = Window::open(&own).expect("window");
        // On a machine that others use, time passes faster than our share of it.
        let until = Instant::now() + Duration::from_secs(30);
        let worked = || cpu_of(&own).expect("own time")[0].since(window.proxies[0]);
        while worked().total() < 50_000.0 {
            assert!(Instant::now() < until, "no CPU time is counted");
        }
        let used = window.close().expect("used");
        assert!(used.proxies[0].total() >= 50_000.0, "{used:?}");
        assert!(memory(own[0]).expect("memory").resident > 1 << 20);
    }
}
