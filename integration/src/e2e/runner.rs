//! Runs tests and says what became of them.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::case::{Case, Place, Skip};
use super::environment::{Environment, say};
use super::test::Test;

/// No test takes longer.
const LIMIT: Duration = Duration::from_secs(600);
/// Its namespaces are gone by then.
const CLEAN: Duration = Duration::from_secs(180);

/// What became of a test.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It said yes.
    Passed,
    /// It cannot run on this cluster.
    Skipped(String),
    /// Why.
    Failed(String),
    /// It failed, for this reason, and passed when it was run again.
    Flaky(String),
}

/// A test that has ended.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its name.
    pub name: &'static str,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took, without cleaning up.
    pub took: Duration,
}

/// Runs tests: those that may share the cluster up to `parallel` at once, then the others
/// one after another. `again`: what fails is run once more, alone.
pub async fn run(
    environment: Rc<Environment>,
    cases: &[Case],
    parallel: usize,
    again: bool,
) -> Vec<Report> {
    let mut cases = cases.to_vec();
    cases.sort_by_key(|case| case.place);
    let (shared, alone): (Vec<Case>, Vec<Case>) = cases
        .into_iter()
        .partition(|case| case.place == Place::Shared);
    let mut waiting: VecDeque<_> = shared.clone().into();
    let mut running = JoinSet::new();
    let mut reports = Vec::new();
    loop {
        while running.len() < parallel.max(1) {
            let Some(case) = waiting.pop_front() else {
                break;
            };
            running.spawn_local(one(environment.clone(), case));
        }
        match running.join_next().await {
            Some(Ok(report)) => reports.push(report),
            // `one` catches what a test may throw.
            Some(Err(error)) => say(&format!("the runner failed: {error}")),
            None => break,
        }
    }
    for report in reports.iter_mut().filter(|_| again) {
        if let Some(case) = shared.iter().find(|case| case.name == report.name) {
            second_try(&environment, *case, report).await;
        }
    }
    for case in alone {
        let mut report = one(environment.clone(), case).await;
        // Nothing is left of the mesh to try the last on again.
        if again && case.place != Place::Last {
            second_try(&environment, case, &mut report).await;
        }
        reports.push(report);
    }
    reports
}

/// Runs a test that failed once more.
async fn second_try(environment: &Rc<Environment>, case: Case, report: &mut Report) {
    if let Outcome::Failed(why) = &report.outcome {
        say("once more:");
        if let Outcome::Passed = one(environment.clone(), case).await.outcome {
            report.outcome = Outcome::Flaky(why.clone());
        }
    }
}

async fn one(environment: Rc<Environment>, case: Case) -> Report {
    let begin = Instant::now();
    let (outcome, test) = match Test::new(environment, case.name).await {
        Err(error) => (Err(error.context("make the test's namespace")), None),
        Ok(test) => {
            let body = std::panic::AssertUnwindSafe((case.run)(test.clone())).catch_unwind();
            let outcome = match timeout(LIMIT, body).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(panic)) => Err(anyhow::anyhow!("panic: {}", message(&*panic))),
                Err(_) => Err(anyhow::anyhow!("no end within {LIMIT:?}")),
            };
            (outcome, Some(test))
        }
    };
    let took = begin.elapsed();
    let mut outcome = match outcome {
        Ok(()) => Outcome::Passed,
        Err(error) if error.is::<Skip>() => Outcome::Skipped(error.to_string()),
        Err(error) => {
            let mut text = format!("{error:#}");
            if let Some(test) = &test {
                let _ = write!(text, "\n{}", test.explain().await);
            }
            Outcome::Failed(text.trim_end().into())
        }
    };
    if let Some(test) = test {
        let cleaned = timeout(CLEAN, test.clean()).await;
        let problem = match cleaned {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some(format!("no end within {CLEAN:?}")),
        };
        if let Some(problem) = problem {
            let text = format!("its namespaces do not go away: {problem}");
            outcome = match outcome {
                Outcome::Failed(why) => Outcome::Failed(format!("{why}\n{text}")),
                _ => Outcome::Failed(text),
            };
        }
    }
    let report = Report {
        name: case.name,
        outcome,
        took,
    };
    say(&report.line());
    // Now, too: whoever watches, or ends it, has the reason.
    if let Outcome::Failed(why) = &report.outcome {
        say(why);
    }
    report
}

fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("of another kind")
}

impl Report {
    /// A line of the table.
    pub fn line(&self) -> String {
        let (word, why) = match &self.outcome {
            Outcome::Passed => ("ok", String::new()),
            Outcome::Skipped(why) => ("skipped", format!("  ({why})")),
            Outcome::Failed(_) => ("FAILED", String::new()),
            Outcome::Flaky(_) => ("FLAKY", "  (passed when it was run again)".into()),
        };
        format!(
            "{:<66} {word:<7} {:>6.1} s{why}",
            self.name,
            self.took.as_secs_f64()
        )
    }

    /// The table: a line for each test, why those failed that did, the total.
    pub fn table(reports: &[Self]) -> String {
        let mut text = String::from("\n");
        for report in reports {
            let _ = writeln!(text, "{}", report.line());
        }
        for report in reports {
            if let Outcome::Failed(why) | Outcome::Flaky(why) = &report.outcome {
                let _ = writeln!(text, "\n{}: {why}", report.name);
            }
        }
        let count =
            |wanted: fn(&Outcome) -> bool| reports.iter().filter(|r| wanted(&r.outcome)).count();
        let _ = writeln!(
            text,
            "\ne2e result: {}. {} passed; {} failed; {} flaky; {} skipped",
            if Self::passed(reports) {
                "ok"
            } else {
                "FAILED"
            },
            count(|o| matches!(o, Outcome::Passed)),
            count(|o| matches!(o, Outcome::Failed(_))),
            count(|o| matches!(o, Outcome::Flaky(_))),
            count(|o| matches!(o, Outcome::Skipped(_))),
        );
        text
    }

    /// Whether none failed and at least one passed.
    pub fn passed(reports: &[Self]) -> bool {
        !reports
            .iter()
            .any(|r| matches!(r.outcome, Outcome::Failed(_)))
            && reports.iter().any(|r| matches!(r.outcome, Outcome::Passed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcome: Outcome) -> Report {
        Report {
            name: "test",
            outcome,
            took: Duration::ZERO,
        }
    }

    #[test]
    fn only_tests_that_ran_make_a_success() {
        let flaky = report(Outcome::Flaky("z".into()));
        assert!(Report::table(std::slice::from_ref(&flaky)).contains("1 flaky"));
        assert!(Report::passed(&[report(Outcome::Passed), flaky]));
        let (passed, failed) = (report(Outcome::Passed), report(Outcome::Failed("x".into())));
        let skipped = report(Outcome::Skipped("y".into()));
        assert!(Report::passed(&[passed.clone(), skipped.clone()]));
        assert!(!Report::passed(&[passed, failed]));
        assert!(!Report::passed(&[skipped]));
        assert!(!Report::passed(&[]));
    }
}
