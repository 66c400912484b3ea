//! The dumps of several nodes as one. All ztunnels of a mesh ought to know the same
//! workloads, services and policies; where they do not, both versions stay and a sentence
//! says so. Certificates and connections are each node's own.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;

use serde_json::{Map, Value};

use super::dump::{Dump, Entry};

/// One dump of several, each with its ztunnel's name; and sentences about where they
/// disagree.
pub fn merge(mut dumps: Vec<(String, Dump)>) -> (Dump, Vec<String>) {
    if dumps.len() == 1
        && let Some((_, only)) = dumps.pop()
    {
        return (only, Vec::new());
    }
    let mut merged = Dump::default();
    let mut workloads = Agreement::new("workload");
    let mut services = Agreement::new("service");
    let mut policies = Agreement::new("policy");
    let mut proxies = Map::new();
    for (name, dump) in dumps {
        for entry in dump.workloads {
            let view = &entry.view;
            workloads.add(&name, view.uid.clone(), entry);
        }
        for entry in dump.services {
            let view = &entry.view;
            services.add(
                &name,
                format!("{}/{}", view.namespace, view.hostname),
                entry,
            );
        }
        for entry in dump.policies {
            let view = &entry.view;
            policies.add(&name, format!("{}/{}", view.namespace, view.name), entry);
        }
        merged.certificates.extend(dump.certificates);
        merged.pods.extend(dump.pods);
        proxies.insert(name, Value::Object(dump.rest));
    }
    // Version and configuration of each.
    merged.rest.insert("proxies".into(), Value::Object(proxies));
    merged
        .certificates
        .sort_by(|a, b| a.view.identity.cmp(&b.view.identity));
    let mut told = Vec::new();
    merged.workloads = workloads.finish(&mut told);
    merged.services = services.finish(&mut told);
    merged.policies = policies.finish(&mut told);
    (merged, told)
}

/// What the ztunnels say about each object, by its key.
struct Agreement<T> {
    kind: &'static str,
    versions: BTreeMap<String, Vec<Version<T>>>,
}

/// An entry, and the ztunnels that have it so.
type Version<T> = (Entry<T>, Vec<String>);

impl<T> Agreement<T> {
    fn new(kind: &'static str) -> Self {
        Self {
            kind,
            versions: BTreeMap::new(),
        }
    }

    fn add(&mut self, ztunnel: &str, key: String, entry: Entry<T>) {
        let versions = match self.versions.entry(key) {
            Slot::Vacant(slot) => slot.insert(Vec::new()),
            Slot::Occupied(slot) => slot.into_mut(),
        };
        match versions
            .iter_mut()
            .find(|(known, _)| known.raw == entry.raw)
        {
            Some((_, by)) => by.push(ztunnel.to_owned()),
            None => versions.push((entry, vec![ztunnel.to_owned()])),
        }
    }

    fn finish(self, told: &mut Vec<String>) -> Vec<Entry<T>> {
        let mut all = Vec::new();
        for (key, versions) in self.versions {
            if versions.len() > 1 {
                let sides: Vec<String> = versions.iter().map(|(_, by)| by.join(" and ")).collect();
                told.push(format!(
                    "the ztunnels disagree about {} {key}, every version is shown: {}",
                    self.kind,
                    sides.join(" against ")
                ));
            }
            all.extend(versions.into_iter().map(|(entry, _)| entry));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump(node: &str, protocol: &str) -> (String, Dump) {
        let text = format!(
            r#"{{"workloads": [{{"uid": "a", "name": "a", "protocol": "{protocol}"}}, {{"uid": "b"}}],
                "certificates": [{{"identity": "{node}"}}],
                "workloadState": {{"uid-{node}": {{}}}},
                "version": {{"version": "1"}}}}"#
        );
        (
            node.to_owned(),
            Dump::parse(text.as_bytes()).expect("a dump"),
        )
    }

    #[test]
    fn the_same_from_two_nodes_is_one() {
        let (merged, told) = merge(vec![dump("n1", "TCP"), dump("n2", "TCP")]);
        assert_eq!(merged.workloads.len(), 2);
        assert_eq!(merged.certificates.len(), 2);
        assert_eq!(merged.pods.len(), 2);
        assert_eq!(merged.rest["proxies"]["n2"]["version"]["version"], "1");
        assert_eq!(told, Vec::<String>::new());
    }

    #[test]
    fn a_disagreement_is_told_and_both_are_shown() {
        let (merged, told) = merge(vec![
            dump("n1", "TCP"),
            dump("n2", "HBONE"),
            dump("n3", "TCP"),
        ]);
        assert_eq!(merged.workloads.len(), 3);
        assert_eq!(
            told,
            [
                "the ztunnels disagree about workload a, every version is shown: n1 and n3 against n2"
            ]
        );
    }
}
