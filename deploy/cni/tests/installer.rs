//! The installer on directories of this test, among network plugins that do what they like.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use adit_cni::install::{InPlace, InstallError, Installer, Wanted, keep, uninstall};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);
const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}"#;
const OTHER: &str = r#"{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "other"}]}"#;
const SINGLE: &str = r#"{"cniVersion": "0.3.1", "name": "net", "type": "bridge"}"#;

struct Node {
    directory: tempfile::TempDir,
    installer: Installer,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        for name in ["bin", "net.d"] {
            fs::create_dir(at(name)).expect("made");
        }
        fs::write(at("binary"), "first version").expect("written");
        let installer = Installer {
            bin_dir: at("bin"),
            conf_dir: at("net.d"),
            binary: at("binary"),
            entry: json!({"type": "adit-cni", "agentSocket": "/a"}),
            conf_name: None,
            in_place: InPlace::default(),
        };
        Self {
            directory,
            installer,
        }
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.installer.conf_dir.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.conf(name), text).expect("written");
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.installer.conf_dir).expect("there");
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .expect("there")
                    .file_name()
                    .into_string()
                    .expect("text")
            })
            .collect();
        names.sort();
        names
    }

    fn uninstall(&self) {
        uninstall(&self.installer.bin_dir, &self.installer.conf_dir).expect("removed");
        assert_eq!(
            fs::read_dir(&self.installer.bin_dir)
                .expect("there")
                .count(),
            0
        );
    }
}

fn types(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let conf: Value = serde_json::from_str(&text).unwrap_or_default();
    let plugins = conf["plugins"].as_array().cloned().unwrap_or_default();
    let name = |plugin: &Value| plugin["type"].as_str().unwrap_or_default().to_owned();
    plugins.iter().map(name).collect()
}

#[test]
fn the_plugin_joins_the_first_configuration_and_leaves_nothing() {
    let node = Node::new();
    node.write("10-net.conflist", LIST);
    node.write("20-other.conflist", OTHER);
    node.write("00-readme.txt", "not a configuration");
    assert_eq!(node.installer.reconcile().expect("installed").len(), 2);
    assert!(node.installer.reconcile().expect("installed").is_empty());
    assert_eq!(types(&node.conf("10-net.conflist")), ["bridge", "adit-cni"]);
    assert_eq!(types(&node.conf("20-other.conflist")), ["other"]);
    let binary = node.installer.bin_dir.join("adit-cni");
    let mode = fs::metadata(&binary).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o755);

    fs::write(node.directory.path().join("binary"), "second version").expect("written");
    node.installer.reconcile().expect("installed");
    assert_eq!(
        fs::read_to_string(&binary).expect("there"),
        "second version"
    );

    node.uninstall();
    assert_eq!(types(&node.conf("10-net.conflist")), ["bridge"]);
    let names = ["00-readme.txt", "10-net.conflist", "20-other.conflist"];
    assert_eq!(node.names(), names);
}

#[test]
fn it_follows_when_another_configuration_comes_first() {
    let node = Node::new();
    node.write("10-net.conflist", LIST);
    node.installer.reconcile().expect("installed");
    node.write("05-other.conflist", OTHER);
    node.installer.reconcile().expect("installed");
    assert_eq!(
        types(&node.conf("05-other.conflist")),
        ["other", "adit-cni"]
    );
    assert_eq!(types(&node.conf("10-net.conflist")), ["bridge"]);
    // What a runtime cannot read it passes over, and so do we.
    node.write("00-broken.conflist", "{");
    assert!(node.installer.reconcile().expect("installed").is_empty());
}

#[test]
fn it_joins_the_one_that_it_is_told() {
    let mut node = Node::new();
    node.write("10-net.conflist", LIST);
    node.write("20-other.conflist", OTHER);
    node.installer.conf_name = Some("20-other.conflist".into());
    node.installer.reconcile().expect("installed");
    assert_eq!(types(&node.conf("10-net.conflist")), ["bridge"]);
    assert_eq!(
        types(&node.conf("20-other.conflist")),
        ["other", "adit-cni"]
    );
}

#[test]
fn a_single_plugin_becomes_a_list_and_comes_back_as_it_was() {
    let node = Node::new();
    node.write("10-net.conf", SINGLE);
    node.installer.reconcile().expect("installed");
    assert_eq!(node.names(), ["10-net.conf.adit-saved", "10-net.conflist"]);
    assert_eq!(types(&node.conf("10-net.conflist")), ["bridge", "adit-cni"]);
    // Its owner writes it again.
    let newer = SINGLE.replace("net", "newer");
    node.write("10-net.conf", &newer);
    node.installer.reconcile().expect("installed");
    assert_eq!(node.names(), ["10-net.conf.adit-saved", "10-net.conflist"]);
    assert!(node.installer.reconcile().expect("installed").is_empty());
    node.uninstall();
    assert_eq!(node.names(), ["10-net.conf"]);
    assert_eq!(
        fs::read_to_string(node.conf("10-net.conf")).expect("there"),
        newer
    );
}

#[test]
fn a_single_plugin_comes_back_under_the_name_that_it_had() {
    let node = Node::new();
    node.write("10-net.json", SINGLE);
    node.installer.reconcile().expect("installed");
    assert_eq!(node.names(), ["10-net.conflist", "10-net.json.adit-saved"]);
    assert!(node.installer.reconcile().expect("installed").is_empty());
    node.uninstall();
    assert_eq!(node.names(), ["10-net.json"]);
    assert_eq!(
        fs::read_to_string(node.conf("10-net.json")).expect("there"),
        SINGLE
    );
}

#[test]
fn a_list_of_somebody_else_is_not_overwritten() {
    let node = Node::new();
    node.write("10-net.conf", SINGLE);
    node.write("10-net.conflist", OTHER);
    let error = node.installer.reconcile().expect_err("not ours");
    assert!(matches!(error, InstallError::Taken { .. }), "{error}");
    assert_eq!(types(&node.conf("10-net.conflist")), ["other"]);
    assert_eq!(node.names(), ["10-net.conf", "10-net.conflist"]);
    // Nor one that the plugin had joined.
    fs::remove_file(node.conf("10-net.conf")).expect("removed");
    node.installer.reconcile().expect("installed");
    node.write("10-net.conf", SINGLE);
    let error = node.installer.reconcile().expect_err("not ours");
    assert!(matches!(error, InstallError::Taken { .. }), "{error}");
    node.uninstall();
    assert_eq!(types(&node.conf("10-net.conflist")), ["other"]);
    assert_eq!(node.names(), ["10-net.conf", "10-net.conflist"]);
}

#[test]
fn a_list_that_was_made_before_a_crash_is_our_own() {
    let node = Node::new();
    node.write("10-net.conf", SINGLE);
    node.installer.reconcile().expect("installed");
    let (single, saved) = ("10-net.conf", "10-net.conf.adit-saved");
    fs::rename(node.conf(saved), node.conf(single)).expect("moved");
    node.installer.reconcile().expect("installed");
    assert_eq!(node.names(), [saved, "10-net.conflist"]);
}

/// Its owner has gone over to a list of its own, in the place of ours.
#[test]
fn a_list_that_took_the_place_of_ours_stays() {
    let node = Node::new();
    node.write("10-net.conf", SINGLE);
    node.installer.reconcile().expect("installed");
    node.write("10-net.conflist", OTHER);
    node.installer.reconcile().expect("installed");
    assert_eq!(types(&node.conf("10-net.conflist")), ["other", "adit-cni"]);
    node.uninstall();
    assert_eq!(types(&node.conf("10-net.conflist")), ["other"]);
    assert_eq!(node.names(), ["10-net.conflist"]);
}

#[test]
fn a_binary_that_nobody_has_touched_is_not_read_again() {
    const LARGE: usize = 4 << 20;
    let node = Node::new();
    let source = node.directory.path().join("binary");
    fs::write(&source, vec![b'x'; LARGE]).expect("written");
    node.write("10-net.conflist", LIST);
    // Reading by this thread only.
    let read_so_far = || {
        let text = fs::read_to_string("/proc/thread-self/io").expect("Linux");
        let count = text.lines().find_map(|line| line.strip_prefix("rchar: "));
        count.expect("there").parse::<usize>().expect("a number")
    };
    node.installer.reconcile().expect("installed");
    node.installer.reconcile().expect("compared");
    let before = read_so_far();
    node.installer.reconcile().expect("unchanged");
    assert!(read_so_far() - before < LARGE / 2, "read again");

    // The same length, at any place.
    let target = node.installer.bin_dir.join("adit-cni");
    for touched in [&target, &source] {
        fs::write(touched, vec![b'y'; LARGE]).expect("written");
        node.installer.reconcile().expect("installed");
        let (wanted, found) = (fs::read(&source), fs::read(&target));
        assert!(wanted.expect("there") == found.expect("there"));
    }
    fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).expect("ours");
    node.installer.reconcile().expect("installed");
    let mode = fs::metadata(&target).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}

#[test]
fn without_a_configuration_it_waits_and_says_so() {
    let node = Node::new();
    let error = node.installer.reconcile().expect_err("nothing there");
    assert!(matches!(error, InstallError::NoConfiguration(_)), "{error}");
    node.write("10-net.conflist", &LIST.replace("1.0.0", "0.2.0"));
    let error = node.installer.reconcile().expect_err("too old");
    assert!(error.to_string().contains("0.2.0"), "{error}");
    node.uninstall();
    assert_eq!(node.names(), ["10-net.conflist"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_comes_back_when_the_configuration_is_rewritten() {
    let node = Node::new();
    let installed = Arc::new(AtomicBool::new(false));
    let keeping = tokio::spawn(keep(
        node.installer.clone(),
        installed.clone(),
        Wanted::default(),
    ));
    let path = node.conf("10-net.conflist");
    // First there is none, then in every way in which one is written.
    for how in 0..6 {
        match how % 3 {
            0 => fs::write(&path, LIST).expect("written"),
            1 => {
                let new = node.conf(".new");
                fs::write(&new, LIST).expect("written");
                fs::rename(&new, &path).expect("moved");
            }
            _ => {
                fs::remove_file(&path).expect("removed");
                fs::write(&path, LIST).expect("written");
            }
        }
        let deadline = Instant::now() + PATIENCE;
        while types(&path) != ["bridge", "adit-cni"] || !installed.load(Ordering::Relaxed) {
            assert!(Instant::now() < deadline, "it did not come back ({how})");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    // A directory that is made anew.
    fs::rename(&node.installer.conf_dir, node.directory.path().join("old")).expect("moved");
    fs::create_dir(&node.installer.conf_dir).expect("made");
    fs::write(&path, LIST).expect("written");
    let deadline = Instant::now() + PATIENCE;
    while types(&path) != ["bridge", "adit-cni"] {
        assert!(Instant::now() < deadline, "it did not come back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fs::remove_file(node.installer.bin_dir.join("adit-cni")).expect("removed");
    let deadline = Instant::now() + PATIENCE;
    while !node.installer.bin_dir.join("adit-cni").exists() {
        assert!(Instant::now() < deadline, "the binary did not come back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    keeping.abort();
}

/// The agent ends while it is putting the plugin back: what it takes out stays out. A
/// configuration that names a binary which is gone would keep the node's pods from ending.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_out_for_good_is_not_put_back() {
    for round in 0..20 {
        let node = Node::new();
        let wanted = Wanted::default();
        let looked = Arc::new(AtomicBool::new(false));
        let keeping = tokio::spawn(keep(node.installer.clone(), looked.clone(), wanted.clone()));
        let path = node.conf("10-net.conflist");
        fs::write(&path, LIST).expect("written");
        let (bin, conf) = (&node.installer.bin_dir, &node.installer.conf_dir);
        // At once, and in the midst of each step.
        let step = |what: &'static str, done: &dyn Fn() -> bool| {
            let deadline = Instant::now() + PATIENCE;
            while !done() {
                assert!(Instant::now() < deadline, "waited in vain: {what}");
                std::hint::spin_loop();
            }
        };
        match round % 4 {
            0 => {}
            1 => step("the binary", &|| bin.join("adit-cni").exists()),
            2 => step("its entry", &|| types(&path) == ["bridge", "adit-cni"]),
            _ => step("the end of the round", &|| looked.load(Ordering::Relaxed)),
        }
        wanted.uninstall(bin, conf).expect("taken out");
        // Its owner writes it once more, and whoever keeps it hears of that. Of the two
        // rounds that end after this, the second has begun after it.
        for _ in 0..2 {
            looked.store(false, Ordering::Relaxed);
            fs::write(&path, LIST).expect("written");
            let deadline = Instant::now() + PATIENCE;
            while !looked.load(Ordering::Relaxed) {
                assert!(Instant::now() < deadline, "nobody has looked");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert_eq!(types(&path), ["bridge"]);
        assert!(!bin.join("adit-cni").exists());
        keeping.abort();
    }
}

/// An owner that writes all the time always has its last word in the file, with ours behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_text_of_the_owner_is_lost() {
    let node = Node::new();
    let installed = Arc::new(AtomicBool::new(false));
    let keeping = tokio::spawn(keep(node.installer.clone(), installed, Wanted::default()));
    let path = node.conf("10-net.conflist");
    // Until the two have met often enough.
    let (mut last, mut met) = (0, 0);
    let deadline = Instant::now() + PATIENCE;
    while met < 20 {
        assert!(Instant::now() < deadline, "joined {met} times");
        last += 1;
        let new = node.conf(".owner");
        let text = LIST.replace("bridge", &format!("bridge-{last}"));
        fs::write(&new, text).expect("written");
        met += usize::from(types(&path).len() == 2);
        fs::rename(&new, &path).expect("moved");
        tokio::task::yield_now().await;
    }
    let expected = [format!("bridge-{last}"), "adit-cni".to_owned()];
    let deadline = Instant::now() + PATIENCE;
    while types(&path) != expected {
        assert!(Instant::now() < deadline, "{:?}", types(&path));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    keeping.abort();
}
