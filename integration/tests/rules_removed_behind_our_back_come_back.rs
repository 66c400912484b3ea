//! What somebody removes from an enrolled pod's network namespace is there again at once, and
//! counted.

use std::time::{Duration, Instant};

use adit_integration::mesh::{MeshBuilder, SAMPLE_MESH};
use adit_integration::pod;

#[test]
fn rules_and_routes_are_restored_and_counted() -> anyhow::Result<()> {
    let mesh = MeshBuilder::default().files(SAMPLE_MESH).up()?;
    let client = pod("shop/client");
    let target = mesh.at(pod("shop/web-b"), 8080)?;
    assert!(mesh.http_get(client, target)?.is_ok());
    let rules = |family: &str| mesh.run_in(client, &["ip", family, "rule", "show"]);
    let routes = |family: &str| -> anyhow::Result<String> {
        let all = mesh.run_in(client, &["ip", family, "route", "show", "table", "all"])?;
        // `local` and `main` are the system's.
        let ours = |line: &&str| {
            line.split(" table ")
                .nth(1)
                .is_some_and(|t| !t.starts_with("local"))
        };
        Ok(all.lines().filter(ours).collect::<Vec<_>>().join("\n"))
    };
    let repairs = |kind: &str| -> anyhow::Result<f64> {
        let metrics = mesh.metrics("node1")?;
        Ok(metrics.sum("adit_redirection_repairs_total", &[("kind", kind)]))
    };
    let system = ["local", "main", "default"];
    for family in ["-4", "-6"] {
        let (rules_before, routes_before) = (rules(family)?, routes(family)?);
        assert!(
            !routes_before.is_empty(),
            "{family}: the capture has routes"
        );
        let ours: Vec<&str> = rules_before
            .lines()
            .filter(|l| {
                !system
                    .iter()
                    .any(|s| l.trim().ends_with(&format!("lookup {s}")))
            })
            .filter_map(|l| l.split(':').next())
            .collect();
        assert!(!ours.is_empty(), "{family}: {rules_before}");
        let counted = repairs("rule")?;
        for preference in &ours {
            mesh.run_in(client, &["ip", family, "rule", "del", "pref", preference])?;
        }
        let begin = Instant::now();
        mesh.eventually("the rules", || {
            let now = rules(family)?;
            anyhow::ensure!(now == rules_before, "{now}");
            Ok(())
        })?;
        assert!(
            begin.elapsed() < Duration::from_secs(8),
            "{:?}",
            begin.elapsed()
        );
        mesh.eventually("the counter", || {
            let now = repairs("rule")?;
            anyhow::ensure!(now >= counted + ours.len() as f64, "{now}, was {counted}");
            Ok(())
        })?;
        assert!(mesh.http_get(client, target)?.is_ok());

        let counted = repairs("route")?;
        let mut tables: Vec<&str> = routes_before
            .lines()
            .filter_map(|l| l.split(" table ").nth(1)?.split_whitespace().next())
            .collect();
        tables.sort_unstable();
        tables.dedup();
        for table in tables {
            mesh.run_in(client, &["ip", family, "route", "flush", "table", table])?;
        }
        mesh.eventually("the routes", || {
            let now = routes(family)?;
            anyhow::ensure!(now == routes_before, "{now}");
            Ok(())
        })?;
        mesh.eventually("the counter", || {
            let now = repairs("route")?;
            anyhow::ensure!(now > counted, "{now}, was {counted}");
            Ok(())
        })?;
        assert!(mesh.http_get(client, target)?.is_ok());
    }
    Ok(())
}

/// Until a rule is back new connections leave in plaintext, so somebody must be told that it is
/// gone; whoever only looks now and then (every 3 s) would miss this deadline.
#[test]
fn a_rule_is_back_at_once() -> anyhow::Result<()> {
    const DEADLINE: Duration = Duration::from_millis(400);
    let mesh = MeshBuilder::default().files(SAMPLE_MESH).up()?;
    let client = pod("shop/client");
    let mut slowest = Duration::ZERO;
    for family in ["-4", "-6"] {
        let rules = || mesh.run_in(client, &["ip", family, "rule", "show"]);
        let before = rules()?;
        for _ in 0..5 {
            let begin = Instant::now();
            mesh.run_in(client, &["ip", family, "rule", "del", "pref", "5"])?;
            while rules()? != before {
                anyhow::ensure!(begin.elapsed() < DEADLINE, "{}", rules()?);
            }
            slowest = slowest.max(begin.elapsed());
        }
    }
    println!("slowest, two runs of ip included: {slowest:?}");
    Ok(())
}
