//! Istio's mesh configuration as waypoints get it.

use adit_controlplane::compile::{Compiler, MeshConfig, Redirections};
use adit_controlplane::serve::SnapshotBuilder;
use adit_shared::proto::waypoint::{PROVIDER_TYPE, SETTINGS_TYPE};
use adit_shared::proto::waypoint::{Provider, Settings, provider::Kind};
use prost::Message;

use crate::harness::read;

fn compiled(mesh: &str) -> (Settings, Vec<Provider>) {
    let mesh: String = mesh.lines().map(|line| format!("    {line}\n")).collect();
    let yaml = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n{mesh}"
    );
    let (objects, findings) = read(&yaml);
    assert!(findings.is_empty(), "{findings:?}");
    let mut snapshot = SnapshotBuilder::new();
    let mut compiler = Compiler::new(MeshConfig::default());
    compiler.update(&objects, &Redirections::default(), &mut snapshot);
    let snapshot = snapshot.build();
    let of = |url| {
        snapshot
            .resources(url)
            .into_iter()
            .flat_map(|set| set.iter())
    };
    let settings = of(SETTINGS_TYPE)
        .map(|(_, resource)| Settings::decode(resource.body().clone()).unwrap())
        .next();
    let providers = of(PROVIDER_TYPE)
        .map(|(_, resource)| Provider::decode(resource.body().clone()).unwrap())
        .collect();
    (settings.unwrap(), providers)
}

#[test]
fn all_that_means_something() {
    let (settings, providers) = compiled(
        "accessLogFile: /dev/stdout\naccessLogEncoding: JSON\ntrustDomainAliases: [old.td]\npathNormalization: {normalization: MERGE_SLASHES}\ndefaultConfig: {tracing: {sampling: 10}, discoveryAddress: x}\ndefaultProviders: {tracing: [otel]}\ndefaultHttpRetryPolicy: {attempts: 1, retryOn: '503,connect-failure', perTryTimeout: 2s}\nsomethingElse: 1\nextensionProviders:\n- name: opa\n  envoyExtAuthzGrpc: {service: opa.opa.svc.cluster.local, port: 9191, timeout: 1s, failOpen: true, includeRequestBodyInCheck: {maxRequestBytes: 1024}}\n- name: http\n  envoyExtAuthzHttp: {service: foo/ext.foo.svc.cluster.local, port: 8000, pathPrefix: /check, includeRequestHeadersInCheck: [x-a], statusOnError: '401'}\n- name: otel\n  opentelemetry: {service: otel.o.svc.cluster.local, port: 4317}\n- name: zip\n  zipkin: {service: z, port: 9411}\n- name: file\n  envoyFileAccessLog: {path: /dev/stdout, logFormat: {labels: {a: '%PROTOCOL%'}}}\n- name: prom\n  prometheus: {}\n- name: dog\n  datadog: {service: d, port: 1}\n- name: bad\n  envoyExtAuthzGrpc: {service: x}",
    );
    assert!(settings.access_log);
    assert_eq!(settings.trust_domain_aliases, ["old.td"]);
    assert_eq!(settings.root_namespace, "istio-system");
    assert!(settings.trace_sampling_set && settings.trace_sampling == 10.0);
    assert_eq!(settings.default_tracing_providers, ["otel"]);
    let retry = settings.default_retry.unwrap();
    assert_eq!((retry.attempts, retry.codes), (1, vec![503]));
    assert_eq!(
        retry.conditions,
        ["connect-failure", "retriable-status-codes"]
    );
    let kinds = providers.iter().map(|of| {
        let kind = match of.kind.as_ref().unwrap() {
            Kind::ExtAuthzGrpc(of) => {
                let common = of.common.as_ref().unwrap();
                format!("grpc {} {}", common.fail_open, common.body_max_bytes)
            }
            Kind::ExtAuthzHttp(of) => {
                let common = of.common.as_ref().unwrap();
                let service = common.service.as_ref().unwrap();
                format!("http {} {}", service.hostname, common.status_on_error)
            }
            Kind::Opentelemetry(_) => "otel".into(),
            Kind::Zipkin(_) => "zipkin".into(),
            Kind::FileAccessLog(of) => format!("file {}", of.format),
            Kind::Prometheus(_) => "prometheus".into(),
            Kind::Invalid(_) => "invalid".into(),
        };
        format!("{}={kind}", of.name)
    });
    assert_eq!(
        kinds.collect::<Vec<_>>().join("; "),
        "bad=invalid; dog=invalid; file=file {\"a\":\"%PROTOCOL%\"}; http=http ext.foo.svc.cluster.local 401; opa=grpc true 1024; otel=otel; prom=prometheus; zip=zipkin"
    );
}

#[test]
fn without_it_istios_defaults_hold() {
    let (settings, providers) = compiled("{}");
    assert!(!settings.access_log && !settings.trace_sampling_set);
    assert_eq!(settings.trust_domain, "cluster.local");
    assert!(providers.is_empty());
}
