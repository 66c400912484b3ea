//! A directory that changes under the control plane's feet, on real files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use adit_controlplane::model::{Code, Objects, PolicyScope, Severity};
use adit_controlplane::source::{Directory, DirectorySource, SourceState, WatchOptions};
use tempfile::TempDir;
use tokio::sync::watch;

const DEADLINE: Duration = Duration::from_secs(10);

struct Source {
    directory: TempDir,
    _source: DirectorySource,
    state: watch::Receiver<SourceState>,
}

impl Source {
    async fn open(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        // No poll: the notifications have to do it.
        let options = WatchOptions {
            poll: Duration::from_secs(3600),
            ..WatchOptions::default()
        };
        let source = DirectorySource::open(vec![directory.path().into()], options).await;
        let state = source.subscribe();
        Self {
            directory,
            _source: source,
            state,
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces a file as editors and `kubectl`-like tools do.
    fn replace(&self, name: &str, text: &str) {
        let temporary = self.path(&format!(".{name}.tmp"));
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.path(name)).unwrap();
    }

    async fn wait(&mut self, what: &str, mut condition: impl FnMut(&SourceState) -> bool) {
        let waited = tokio::time::timeout(DEADLINE, self.state.wait_for(|s| condition(s)))
            .await
            .is_ok();
        if !waited {
            panic!("{what}: {:?}", self.state.borrow().findings);
        }
    }
}

fn names(objects: &Objects) -> String {
    let mut all = Vec::new();
    for (namespace, of) in &objects.namespaces {
        let services = of.services.keys().map(|name| format!("{namespace}/{name}"));
        let policies = of.authorization_policies.keys();
        all.extend(services.chain(policies.map(|name| format!("{namespace}/{name}!"))));
    }
    all.join(" ")
}

fn service(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: a}}\nspec: {{ports: [{{port: 80}}]}}\n"
    )
}

fn policy(spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: a}}\nspec: {spec}\n"
    )
}

#[tokio::test]
async fn files_come_change_and_go() {
    let mut source = Source::open(&[("one.yaml", &service("one"))]).await;
    assert_eq!(names(&source.state.borrow().objects), "a/one");
    fs::write(source.path("two.yml"), service("two")).unwrap();
    source
        .wait("a new file", |s| names(&s.objects) == "a/one a/two")
        .await;
    source.replace("one.yaml", &service("uno"));
    source
        .wait("a replaced file", |s| names(&s.objects) == "a/two a/uno")
        .await;
    fs::remove_file(source.path("two.yml")).unwrap();
    source
        .wait("a removed file", |s| names(&s.objects) == "a/uno")
        .await;
    fs::create_dir(source.path("more")).unwrap();
    fs::write(source.path("more/three.yaml"), service("three")).unwrap();
    source
        .wait("a new folder", |s| names(&s.objects) == "a/three a/uno")
        .await;
    // Temporary files of editors and programs are not manifests.
    for name in [
        ".four.yaml.swp",
        "four.yaml~",
        "#four.yaml#",
        ".four.yaml",
        "4913",
    ] {
        fs::write(source.path(name), service("four")).unwrap();
    }
    fs::write(source.path("five.json"), r#"{"apiVersion":"v1","kind":"ServiceList","items":[{"metadata":{"name":"five","namespace":"a"}}]}"#).unwrap();
    source
        .wait("a JSON list", |s| {
            names(&s.objects) == "a/five a/three a/uno"
        })
        .await;
    fs::rename(source.path("more"), source.path("rest")).unwrap();
    fs::remove_file(source.path("five.json")).unwrap();
    source
        .wait("a renamed folder", |s| names(&s.objects) == "a/three a/uno")
        .await;
    assert!(source.state.borrow().findings.is_empty());
}

/// As in a mounted ConfigMap: `name -> ..data/name`, `..data -> ..<time>`.
#[tokio::test]
async fn a_mounted_config_map_is_swapped_as_a_whole() {
    let mut source = Source::open(&[]).await;
    let swap = |source: &Source, version: &str, text: &str| {
        fs::create_dir(source.path(version)).unwrap();
        fs::write(source.path(version).join("a.yaml"), text).unwrap();
        symlink(version, source.path("..data_tmp")).unwrap();
        fs::rename(source.path("..data_tmp"), source.path("..data")).unwrap();
    };
    swap(&source, "..2025_1", &service("one"));
    symlink("..data/a.yaml", source.path("a.yaml")).unwrap();
    source
        .wait("the first version", |s| names(&s.objects) == "a/one")
        .await;
    swap(&source, "..2025_2", &service("two"));
    fs::remove_dir_all(source.path("..2025_1")).unwrap();
    source
        .wait("the second version", |s| names(&s.objects) == "a/two")
        .await;
}

#[tokio::test]
async fn a_broken_document_spoils_nothing() {
    let good = format!("{}{}{}", service("one"), service("two"), service("three"));
    let mut source = Source::open(&[("a.yaml", &good)]).await;
    // The second is cut off in the middle.
    let broken = format!(
        "{}---\napiVersion: v1\nkind: Service\nmetadata: {{name: two\n{}",
        service("one"),
        service("four")
    );
    source.replace("a.yaml", &broken);
    source.wait("a finding", |s| !s.findings.is_empty()).await;
    {
        let state = source.state.borrow();
        // `three` may be what cannot be read.
        assert_eq!(names(&state.objects), "a/four a/one a/three a/two");
        let finding = &state.findings[0];
        assert_eq!(
            (finding.code, finding.severity),
            (Code::Unreadable, Severity::Error)
        );
        assert!(finding.file.as_ref().unwrap().ends_with("a.yaml"));
        assert_eq!(finding.line, 9);
    }
    source.replace("a.yaml", &service("one"));
    source
        .wait("the mended file", |s| names(&s.objects) == "a/one")
        .await;
    assert!(source.state.borrow().findings.is_empty());
}

#[tokio::test]
async fn the_last_good_version_of_an_object_stays_in_force() {
    let text = |spec: &str| format!("{}{}", service("one"), policy(spec));
    let good = "{action: DENY, rules: [{}]}";
    let mut source = Source::open(&[("a.yaml", &text(good))]).await;
    let before = source.state.borrow().objects.namespaces["a"].authorization_policies["p"].clone();
    for (bad, field) in [
        (
            "{action: DENY, rules: [{from: [{source: {ipBlocks: [1.2.3.4/99]}}]}]}",
            "spec.rules[0].from[0].source.ipBlocks[0]",
        ),
        ("{acton: DENY}", "spec.acton"),
        ("[1]", "spec"),
    ] {
        source.replace("a.yaml", &text(bad));
        source
            .wait(field, |s| s.findings.iter().any(|f| f.field == field))
            .await;
        let state = source.state.borrow();
        let now = &state.objects.namespaces["a"].authorization_policies["p"];
        assert_eq!(now.spec, before.spec, "{field}");
        let finding = state.findings.iter().find(|f| f.field == field).unwrap();
        assert_eq!(
            finding.object.as_ref().unwrap().to_string(),
            "AuthorizationPolicy a/p"
        );
        assert_eq!(finding.line, 10, "{finding}");
        assert!(finding.message.contains("last good version"), "{finding}");
        assert_eq!(names(&state.objects), "a/one a/p!");
    }
    source.replace("a.yaml", &text("{selector: {}}"));
    source
        .wait("the mended policy", |s| s.findings.is_empty())
        .await;
    let state = source.state.borrow();
    let now = &state.objects.namespaces["a"].authorization_policies["p"];
    assert!(matches!(now.scope(), PolicyScope::Selector(_)));
}

/// A pod's fields are typed; what does not fit is named with its line.
#[test]
fn errors_have_file_line_field_and_object() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let write = |name: &str, text: &str| fs::write(path.join(name), text).unwrap();
    write(
        "pod.yaml",
        "# head\n\napiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec:\n  containers:\n  - name: c\n    ports:\n    - containerPort: eighty\n",
    );
    write(
        "svc.yaml",
        "kind: List\napiVersion: v1\nitems:\n- kind: Service\n  apiVersion: v1\n  metadata: {name: s}\n  spec:\n    ports:\n    - port: 80\n    - port: 70000\n",
    );
    write(
        "name.yaml",
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: Not_A_Name\n",
    );
    write("none.yaml", "kind: Pod\n");
    write(
        "ip.yaml",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: q}\nstatus:\n  podIPs:\n  - ip: 10.0.0.1\n  - ip: 10.0.0.999\n",
    );
    write(
        "odd.yaml",
        "apiVersion: example.org/v1\nkind: Thing\nmetadata: {name: t}\n",
    );
    write(
        "label.json",
        "{\n \"apiVersion\": \"v1\", \"kind\": \"Pod\",\n \"metadata\": {\"name\": \"j\",\n  \"labels\": {\"a\": 5}}}",
    );
    write("latin1.yaml", "");
    fs::write(path.join("latin1.yaml"), [b'a', b':', 0xff, b'\n']).unwrap();
    let mut source = Directory::new(vec![path.into()]);
    source.reload();
    let found: Vec<String> = source
        .findings()
        .iter()
        .map(|f| {
            let file = f
                .file
                .as_ref()
                .unwrap()
                .file_name()
                .unwrap()
                .to_string_lossy()
                .into_owned();
            let object = f.object.as_ref().map_or("-".into(), ToString::to_string);
            format!("{file}:{} {object} {} {:?}", f.line, f.field, f.code)
        })
        .collect();
    for expected in [
        "pod.yaml:11 Pod default/p spec.containers[0].ports[0].containerPort SchemaValidationError",
        "svc.yaml:10 Service default/s spec.ports[1].port SchemaValidationError",
        "name.yaml:4 - metadata.name SchemaValidationError",
        "none.yaml:1 - apiVersion SchemaValidationError",
        "ip.yaml:7 Pod default/q status.podIPs[1].ip SchemaValidationError",
        "odd.yaml:1 -  kind UnknownKind",
        "label.json:4 Pod default/j metadata.labels.a SchemaValidationError",
        "latin1.yaml:0 -  Unreadable",
    ] {
        let wanted: Vec<&str> = expected.split_whitespace().collect();
        let hit = |text: &String| text.split_whitespace().collect::<Vec<_>>() == wanted;
        assert!(found.iter().any(hit), "{expected} is not in {found:#?}");
    }
    assert_eq!(found.len(), 8, "{found:#?}");
}

#[test]
fn of_duplicates_the_first_file_wins() {
    let directory = tempfile::tempdir().unwrap();
    let write =
        |name: &str, spec: &str| fs::write(directory.path().join(name), policy(spec)).unwrap();
    write("b.yaml", "{action: DENY, rules: [{}]}");
    write("a.yaml", "{rules: [{}]}");
    let mut source = Directory::new(vec![directory.path().into()]);
    for _ in 0..2 {
        source.reload();
        let policy = &source.objects().namespaces["a"].authorization_policies["p"];
        let origin = policy.meta.origin.file.as_ref().unwrap();
        assert!(origin.ends_with("a.yaml"));
        let finding = &source.findings()[0];
        assert_eq!(finding.code, Code::Duplicate);
        assert!(
            finding.file.as_ref().unwrap().ends_with("b.yaml"),
            "{finding}"
        );
    }
    // The other takes over when the winner goes.
    fs::remove_file(directory.path().join("a.yaml")).unwrap();
    source.reload();
    let policy = &source.objects().namespaces["a"].authorization_policies["p"];
    assert!(
        policy
            .meta
            .origin
            .file
            .as_ref()
            .unwrap()
            .ends_with("b.yaml")
    );
    assert!(source.findings().is_empty());
}

#[test]
fn a_folder_that_is_gone_for_a_while_takes_nothing_away() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("config");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("a.yaml"), service("one")).unwrap();
    let mut source = Directory::new(vec![root.clone()]);
    source.reload();
    fs::rename(&root, outer.path().join("away")).unwrap();
    source.reload();
    assert_eq!(names(source.objects()), "a/one");
    assert_eq!(source.findings().len(), 1);
    fs::rename(outer.path().join("away"), &root).unwrap();
    source.reload();
    assert!(source.findings().is_empty());
}

#[test]
fn unchanged_objects_are_the_same_in_memory() {
    let directory = tempfile::tempdir().unwrap();
    let other = service("x").replace("namespace: a", "namespace: b");
    fs::write(directory.path().join("a.yaml"), service("one")).unwrap();
    fs::write(directory.path().join("b.yaml"), &other).unwrap();
    let mut source = Directory::new(vec![directory.path().into()]);
    source.reload();
    let before = source.objects().clone();
    fs::write(
        directory.path().join("b.yaml"),
        format!("{other}{}", service("two")),
    )
    .unwrap();
    source.reload();
    let same = |namespace: &str, one: &Objects, two: &Objects| {
        std::sync::Arc::ptr_eq(&one.namespaces[namespace], &two.namespaces[namespace])
    };
    assert!(same("b", &before, source.objects()));
    assert!(!same("a", &before, source.objects()));
    source.reload();
    assert!(before.namespaces.len() == 2 && !before.same(source.objects()));
}

#[test]
fn odd_files_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    symlink(path, path.join("circle")).unwrap();
    symlink("nowhere", path.join("dangling.yaml")).unwrap();
    let status = std::process::Command::new("mkfifo")
        .arg(path.join("fifo.yaml"))
        .status();
    assert!(status.unwrap().success());
    fs::write(path.join("empty.yaml"), "").unwrap();
    fs::write(path.join("comment.yaml"), "# nothing\n---\n---\n").unwrap();
    fs::write(path.join("deep.yaml"), "[".repeat(100_000)).unwrap();
    fs::write(path.join("scalar.yaml"), "just text\n").unwrap();
    let mut source = Directory::new(vec![Path::new(path).into()]);
    source.reload();
    assert!(source.objects().namespaces.is_empty());
    assert!(
        source
            .findings()
            .iter()
            .all(|f| f.code == Code::Unreadable || f.code == Code::SchemaValidationError)
    );
}
