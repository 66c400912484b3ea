//! Pods of the tests: the sample server and its clients.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use super::test::{SOON, Test, eventually};
use crate::call::Call;

/// Pods that run `adit-sample`. Each serves HTTP/1.1, HTTP/2, gRPC and WebSocket on 8080,
/// TCP echo on 9090, and has a Service of its name (port 80 and 9090), unless it only calls.
#[derive(Debug, Clone)]
pub struct App {
    /// Of the pod (or Deployment), its Service and its label `app`.
    pub name: String,
    /// Pods; with more than one they are a Deployment.
    pub replicas: usize,
    node: Option<usize>,
    account: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    environment: BTreeMap<String, String>,
    command: Option<Vec<String>>,
    deployment: bool,
    host_network: bool,
}

impl App {
    /// A server, which is also where clients are run by [`Test::calls`].
    pub fn server(name: &str) -> Self {
        Self {
            name: name.into(),
            replicas: 1,
            node: None,
            account: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            environment: BTreeMap::new(),
            command: None,
            deployment: false,
            host_network: false,
        }
    }

    /// Runs another command of the sample program, and has no Service.
    pub fn command(name: &str, arguments: &[&str]) -> Self {
        Self {
            command: Some(arguments.iter().map(|a| (*a).to_owned()).collect()),
            ..Self::server(name)
        }
    }

    /// Calls a URL all the time, each call on its own connection.
    pub(crate) fn caller(name: &str, url: &str, interval: Duration) -> Self {
        let interval = interval.as_millis().to_string();
        let arguments = ["call", url, "--count", "10000000", "--interval", &interval];
        Self::command(name, &arguments)
    }

    /// On the node of a number.
    #[must_use]
    pub fn on(mut self, node: usize) -> Self {
        self.node = Some(node);
        self
    }

    /// With a ServiceAccount of its own.
    #[must_use]
    pub fn account(mut self, name: &str) -> Self {
        self.account = Some(name.into());
        self
    }

    /// With a label on its pods.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.into(), value.into());
        self
    }

    /// With an annotation on its pods.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.insert(name.into(), value.into());
        self
    }

    /// With an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    /// As a Deployment of so many pods.
    #[must_use]
    pub fn replicas(mut self, count: usize) -> Self {
        self.replicas = count;
        self.deployment = true;
        self
    }

    /// In the network of its node.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// The objects of it.
    pub(crate) fn yaml(&self, image: &str, node: impl Fn(usize) -> String) -> String {
        let mut labels = self.labels.clone();
        labels.insert("app".into(), self.name.clone());
        let metadata =
            json!({"name": self.name, "labels": labels, "annotations": self.annotations});
        let mut objects = Vec::new();
        if let Some(account) = &self.account {
            objects.push(json!({"apiVersion": "v1", "kind": "ServiceAccount",
                "metadata": {"name": account}}));
        }
        if self.command.is_none() {
            objects.push(json!({"apiVersion": "v1", "kind": "Service",
                "metadata": {"name": self.name, "labels": {"app": self.name}},
                "spec": {"selector": {"app": self.name}, "ports": [
                    {"name": "http", "port": 80, "targetPort": 8080},
                    {"name": "tcp-echo", "port": 9090}]}}));
        }
        let spec = self.pod(image, node);
        objects.push(match self.deployment {
            false => json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}),
            true => json!({"apiVersion": "apps/v1", "kind": "Deployment",
                "metadata": {"name": self.name},
                "spec": {"replicas": self.replicas, "selector": {"matchLabels": {"app": self.name}},
                    "template": {"metadata": {"labels": labels, "annotations": self.annotations},
                        "spec": spec}}}),
        });
        let documents: Vec<_> = objects.iter().map(Value::to_string).collect();
        documents.join("\n---\n")
    }

    fn pod(&self, image: &str, node: impl Fn(usize) -> String) -> Value {
        let mut environment = vec![json!({"name": "POD_NAME",
            "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}})];
        for (name, value) in &self.environment {
            environment.push(json!({"name": name, "value": value}));
        }
        let arguments = self.command.clone().unwrap_or_else(|| vec!["serve".into()]);
        let mut container = json!({
            "name": "app",
            "image": image,
            "imagePullPolicy": "IfNotPresent",
            "args": arguments,
            "env": environment,
            "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}},
        });
        if self.command.is_none() {
            container["ports"] = json!([{"containerPort": 8080}, {"containerPort": 9090}]);
            container["readinessProbe"] =
                json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1});
        }
        let mut spec = json!({
            "containers": [container],
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
        });
        if let Some(number) = self.node {
            spec["nodeSelector"] = json!({"kubernetes.io/hostname": node(number)});
        }
        if let Some(account) = &self.account {
            spec["serviceAccountName"] = json!(account);
        }
        if self.host_network {
            spec["hostNetwork"] = json!(true);
        }
        if self.deployment {
            // The nodes' proxies learn late that a pod ends; until then it has to answer.
            spec["containers"][0]["lifecycle"] = json!({"preStop": {"sleep": {"seconds": 3}}});
            spec["terminationGracePeriodSeconds"] = json!(10);
        }
        spec
    }
}

/// A pod that calls all the time; its log has a line for each call.
pub struct Caller {
    test: Test,
    pod: String,
}

impl Caller {
    pub(crate) fn new(test: Test, pod: &str) -> Self {
        Self {
            test,
            pod: pod.into(),
        }
    }

    /// The calls so far.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn calls(&self) -> anyhow::Result<Vec<Call>> {
        let text = self
            .test
            .cluster()
            .logs(self.test.namespace(), &self.pod, false)
            .await?;
        // The last line may be half there.
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        let calls: Result<Vec<_>, _> = complete.lines().map(serde_json::from_str).collect();
        calls.with_context(|| format!("log of {}", self.pod))
    }

    /// Waits for so many calls after this moment, and returns them.
    ///
    /// # Errors
    /// They do not come.
    pub async fn more(&self, count: usize) -> anyhow::Result<Vec<Call>> {
        let before = self.calls().await.map_or(0, |calls| calls.len());
        eventually(
            &format!("{count} calls of {}", self.pod),
            SOON,
            async || {
                let mut calls = self.calls().await?;
                // The log may have been cut: then there are fewer than before.
                let came = calls.len().saturating_sub(before);
                anyhow::ensure!(came >= count, "{came} came");
                Ok(calls.split_off(before))
            },
        )
        .await
    }

    /// Ends it.
    ///
    /// # Errors
    /// Any call was not answered 200; the pod restarted; or its log cannot be read.
    pub async fn without_failure(self) -> anyhow::Result<Vec<Call>> {
        let calls = self.stop().await?;
        let failed: Vec<_> = calls.iter().filter(|call| call.ok().is_none()).collect();
        anyhow::ensure!(
            failed.is_empty(),
            "{} of {} calls of {} failed, for example: {:?}",
            failed.len(),
            calls.len(),
            self.pod,
            failed[0]
        );
        Ok(calls)
    }

    /// Ends it: all its calls.
    ///
    /// # Errors
    /// The pod restarted, or its log cannot be read.
    pub async fn stop(&self) -> anyhow::Result<Vec<Call>> {
        let calls = self.calls().await?;
        let api = self.test.cluster().api::<Pod>(self.test.namespace());
        let pod = api.get(&self.pod).await?;
        let restarts = pod.status.and_then(|s| s.container_statuses);
        anyhow::ensure!(
            restarts.iter().flatten().all(|c| c.restart_count == 0),
            "{} restarted",
            self.pod
        );
        let now = DeleteParams::default().grace_period(0);
        api.delete(&self.pod, &now).await?;
        Ok(calls)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize as _;

    use super::*;

    fn objects(app: &App) -> Vec<Value> {
        let yaml = app.yaml("image", |n| format!("node-{n}"));
        serde_yaml_ng::Deserializer::from_str(&yaml)
            .map(|document| Value::deserialize(document).expect("YAML"))
            .collect()
    }

    #[test]
    fn a_server_has_a_service_and_a_probe_and_a_caller_has_not() {
        let server = objects(&App::server("web").on(1).account("web"));
        let kinds: Vec<_> = server.iter().map(|o| o["kind"].as_str()).collect();
        assert_eq!(
            kinds,
            [Some("ServiceAccount"), Some("Service"), Some("Pod")]
        );
        let spec = &server[2]["spec"];
        assert_eq!(spec["nodeSelector"]["kubernetes.io/hostname"], "node-1");
        assert_eq!(spec["containers"][0]["args"][0], "serve");
        let caller = objects(&App::caller(
            "load",
            "http://web/",
            Duration::from_millis(20),
        ));
        assert_eq!(caller.len(), 1);
        assert_eq!(caller[0]["spec"]["containers"][0]["args"][5], "20");
        assert!(caller[0]["spec"]["containers"][0]["readinessProbe"].is_null());
    }
}
