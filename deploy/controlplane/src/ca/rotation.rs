//! From one authority to another without a refused handshake. Pure.
//!
//! Who holds a certificate trusts the roots that came with it, until it fetches the next at
//! half of its life. So a new authority is announced first and signs later:
//!
//! 1. *announce*: the old authority signs, both roots are handed out;
//! 2. *retire*: the new one signs, both roots are handed out, until every certificate of
//!    the old one has expired;
//! 3. the new one alone.
//!
//! The old authority is kept in a Secret meanwhile, so that replicas agree and a restart
//! goes on where it was. Deleting that Secret ends the rotation at once.

use std::time::{Duration, SystemTime};

use adit_shared::identity::{CaFiles, LocalCa};

/// How long the stages take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RotationTimes {
    /// Of the first stage: until everybody has fetched a certificate, and with it both
    /// roots.
    pub announce: Duration,
    /// Of the second: until the last certificate of the old authority has expired.
    pub retire: Duration,
}

impl RotationTimes {
    /// For certificates that are valid for `ttl` and renewed at half of that. A little more
    /// than the half, because renewing may need several attempts.
    pub fn for_certificates_of(ttl: Duration) -> Self {
        Self {
            announce: ttl.mul_f64(0.6),
            retire: ttl.mul_f64(1.1),
        }
    }
}

/// The authority that is on its way out.
#[derive(Clone)]
pub(super) struct Previous {
    /// Its files; the roots are all that were handed out at the time.
    pub(super) files: CaFiles,
    /// The signing certificate of the one that follows it.
    pub(super) next: String,
    /// When it was known that another follows.
    pub(super) since: SystemTime,
}

/// What there is to do.
pub(super) enum Step {
    /// Sign with these files and hand out their roots; look again at the time.
    Use(CaFiles, Option<SystemTime>),
    /// As before, but first write down the old authority: others have to know it.
    Begin(Previous),
    /// Use these, and remove what is written of the old authority.
    Finish(CaFiles),
}

/// Decides. `wanted` is the configured authority, `in_force` the one that this process signs
/// with (none after a start), `previous` what is written of an old one, `ended` the signing
/// certificate for which a rotation has been ended by hand.
pub(super) fn step(
    wanted: &CaFiles,
    in_force: Option<&CaFiles>,
    previous: Option<&Previous>,
    ended: Option<&str>,
    times: RotationTimes,
    now: SystemTime,
) -> Step {
    if let Some(previous) = previous {
        if previous.next == wanted.certificate {
            return under_way(wanted, previous, times, now);
        }
        if previous.files.certificate == wanted.certificate {
            // Back to the old one, which everybody trusts; what follows it may have signed.
            let files = with_roots(wanted, &previous.files);
            return match now.duration_since(previous.since) {
                Ok(age) if age >= times.announce + times.retire => Step::Finish(wanted.clone()),
                _ => Step::Use(files, Some(previous.since + times.announce + times.retire)),
            };
        }
    }
    let Some(old) = in_force.or(previous.map(|previous| &previous.files)) else {
        return Step::Use(wanted.clone(), None);
    };
    if ended == Some(wanted.certificate.as_str())
        || old.certificate == wanted.certificate
        || is_trusted_already(wanted, old)
    {
        return Step::Use(wanted.clone(), None);
    }
    if LocalCa::from_files(old).is_err() {
        // Expired, or otherwise of no use: there is nothing to go over from.
        return Step::Use(wanted.clone(), None);
    }
    let files = match previous {
        Some(previous) => with_roots(old, &previous.files),
        None => old.clone(),
    };
    Step::Begin(Previous {
        files,
        next: wanted.certificate.clone(),
        since: now,
    })
}

fn under_way(wanted: &CaFiles, previous: &Previous, times: RotationTimes, now: SystemTime) -> Step {
    let announced = previous.since + times.announce;
    let retired = announced + times.retire;
    // A clock that went back waits longer.
    if now < announced && LocalCa::from_files(&previous.files).is_ok() {
        Step::Use(with_roots(&previous.files, wanted), Some(announced))
    } else if now < retired {
        Step::Use(with_roots(wanted, &previous.files), Some(retired))
    } else {
        Step::Finish(wanted.clone())
    }
}

/// Who trusts `old` accepts what `wanted` signs: the same root, with another intermediate.
fn is_trusted_already(wanted: &CaFiles, old: &CaFiles) -> bool {
    let under_old_roots = CaFiles {
        roots: old.roots.clone(),
        ..wanted.clone()
    };
    LocalCa::from_files(&under_old_roots).is_ok()
}

/// `files` with the roots of `other` beside its own.
fn with_roots(files: &CaFiles, other: &CaFiles) -> CaFiles {
    CaFiles {
        roots: union(&files.roots, &other.roots),
        ..files.clone()
    }
}

/// The PEM blocks of both, each once.
fn union(a: &str, b: &str) -> String {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    let mut blocks: Vec<String> = Vec::new();
    for text in [a, b] {
        for block in text.split(BEGIN).skip(1) {
            let block = format!("{BEGIN}{}\n", block.trim_end());
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
    }
    blocks.concat()
}

#[cfg(test)]
mod tests {
    use adit_shared::identity::TrustDomain;

    use super::*;

    const TIMES: RotationTimes = RotationTimes {
        announce: Duration::from_secs(100),
        retire: Duration::from_secs(1000),
    };

    fn root() -> LocalCa {
        LocalCa::generate(&TrustDomain::default()).expect("a CA")
    }

    fn start() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
    }

    fn roots(files: &CaFiles) -> usize {
        files.roots.matches("BEGIN CERTIFICATE").count()
    }

    /// What is used at each time after the change.
    #[test]
    fn a_new_root_is_announced_before_it_signs_and_the_old_one_outlives_it() {
        let (a, b) = (root().to_files(), root().to_files());
        let Step::Begin(previous) = step(&b, Some(&a), None, None, TIMES, start()) else {
            panic!("not begun")
        };
        assert_eq!(previous.files.certificate, a.certificate);
        let at = |seconds: u64| {
            let now = start() + Duration::from_secs(seconds);
            // A process that has just started does the same as one that has seen it all.
            let fresh = step(&b, None, Some(&previous), None, TIMES, now);
            let old = step(&b, Some(&a), Some(&previous), None, TIMES, now);
            for step in [&fresh, &old] {
                if let Step::Use(files, _) | Step::Finish(files) = step {
                    LocalCa::from_files(files).expect("usable");
                }
            }
            fresh
        };
        for seconds in [0, 99] {
            let Step::Use(files, Some(next)) = at(seconds) else {
                panic!("{seconds}")
            };
            assert_eq!(
                (files.certificate.as_str(), roots(&files)),
                (a.certificate.as_str(), 2)
            );
            assert_eq!(next, start() + TIMES.announce);
        }
        for seconds in [100, 1099] {
            let Step::Use(files, Some(next)) = at(seconds) else {
                panic!("{seconds}")
            };
            assert_eq!(
                (files.certificate.as_str(), roots(&files)),
                (b.certificate.as_str(), 2)
            );
            assert_eq!(next, start() + TIMES.announce + TIMES.retire);
        }
        let Step::Finish(files) = at(1100) else {
            panic!("not finished")
        };
        assert_eq!(
            (files.certificate.as_str(), roots(&files)),
            (b.certificate.as_str(), 1)
        );
    }

    #[test]
    fn what_everybody_trusts_already_signs_at_once() {
        let root = root();
        let day = Duration::from_secs(86_400);
        let first = root.intermediate("a", day).expect("a CA").to_files();
        let second = root.intermediate("b", day).expect("a CA").to_files();
        let used = |wanted: &CaFiles, in_force: Option<&CaFiles>, ended: Option<&str>| match step(
            wanted,
            in_force,
            None,
            ended,
            TIMES,
            start(),
        ) {
            Step::Use(files, None) => files.certificate,
            _ => panic!("a rotation"),
        };
        assert_eq!(used(&first, None, None), first.certificate);
        assert_eq!(used(&first, Some(&first), None), first.certificate);
        assert_eq!(used(&second, Some(&first), None), second.certificate);
        let other = super::tests::root().to_files();
        let ended = Some(other.certificate.as_str());
        assert_eq!(used(&other, Some(&first), ended), other.certificate);
    }

    #[test]
    fn a_rotation_within_a_rotation_forgets_no_root() {
        let (a, b, c) = (root().to_files(), root().to_files(), root().to_files());
        let Step::Begin(first) = step(&b, Some(&a), None, None, TIMES, start()) else {
            panic!("not begun")
        };
        let later = start() + Duration::from_secs(500);
        let Step::Use(in_force, _) = step(&b, Some(&a), Some(&first), None, TIMES, later) else {
            panic!("not under way")
        };
        let Step::Begin(second) = step(&c, Some(&in_force), Some(&first), None, TIMES, later)
        else {
            panic!("not begun")
        };
        assert_eq!(second.files.certificate, b.certificate);
        assert_eq!(
            (second.next.as_str(), second.since),
            (c.certificate.as_str(), later)
        );
        let Step::Use(files, _) = step(&c, None, Some(&second), None, TIMES, later) else {
            panic!("not under way")
        };
        assert_eq!(roots(&files), 3);
    }

    #[test]
    fn going_back_is_possible_at_any_time() {
        let (a, b) = (root().to_files(), root().to_files());
        let Step::Begin(previous) = step(&b, Some(&a), None, None, TIMES, start()) else {
            panic!("not begun")
        };
        let back = step(&a, Some(&a), Some(&previous), None, TIMES, start());
        assert!(matches!(back, Step::Use(files, Some(_)) if files.certificate == a.certificate));
    }

    #[test]
    fn a_bundle_names_a_root_once() {
        let (a, b) = (root().root_pem(), root().root_pem());
        let both = union(&a, &b);
        assert_eq!(union(&both, &b), both);
        assert_eq!(union(&a, &a), a);
        assert_eq!(union(&a, ""), a);
    }
}
