//! From the wire form to [`TrafficSettings`].
//!
//! What cannot be understood fails closed: the settings are then
//! [`TrafficSettings::invalid`] and every pick with them fails, saying which field was
//! wrong. [`TrafficPolicy::problems`] lists all of them for the NACK.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use adit_shared::proto::waypoint as proto;

use super::error::PickError;
use super::settings::*;

/// Largest ring that Envoy allows.
const MAX_RING_SIZE: u64 = 8 * 1024 * 1024;
/// Envoy's and Istio's.
const DEFAULT_RING_SIZE: u32 = 1024;

/// A field that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Problem {
    /// Path of the field in `waypoint.proto`.
    pub field: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// How requests to a host are spread and bounded: settings for all of it, for some of its
/// ports and for its subsets.
#[derive(Debug, Clone, PartialEq)]
pub struct TrafficPolicy {
    /// The host; `*.` prefix allowed.
    pub host: Arc<str>,
    whole: Layer,
    ports: BTreeMap<u16, Layer>,
    subsets: BTreeMap<Arc<str>, Subset>,
    invalid: Option<Arc<str>>,
    problems: Vec<Problem>,
}

/// What holds for one port and subset of a host.
#[derive(Debug, Clone)]
pub struct Selection {
    /// The settings.
    pub settings: Arc<TrafficSettings>,
    /// The workloads that requests may go to; `None`: all.
    pub members: Option<Arc<SubsetMembers>>,
}

#[derive(Debug, Clone, PartialEq)]
struct Subset {
    layer: Layer,
    members: Arc<SubsetMembers>,
}

/// One level of settings: what it does not say comes from the level below.
#[derive(Debug, Clone, PartialEq, Default)]
struct Layer {
    load_balancer: Option<LoadBalancer>,
    connection_pool: Option<ConnectionPool>,
    outlier_detection: Option<OutlierDetection>,
    tls: Option<ClientTls>,
    retry_budget: Option<RetryBudget>,
    /// The first problem in it.
    invalid: Option<Arc<str>>,
}

impl TrafficPolicy {
    /// Converts; never fails, for a policy that cannot be understood is in force as one
    /// that fails.
    pub fn from_proto(policy: &proto::TrafficPolicy) -> Self {
        let mut problems = Problems::default();
        if policy.host.is_empty() {
            problems.add("host", "is empty");
        }
        let mut ports = BTreeMap::new();
        for (number, settings) in &policy.port_settings {
            let path = format!("port_settings[{number}]");
            match u16::try_from(*number) {
                Ok(number) if number > 0 => {
                    ports.insert(number, problems.layer(&path, settings));
                }
                _ => problems.add(path, "is no port"),
            }
        }
        let mut subsets = BTreeMap::new();
        for subset in &policy.subsets {
            let path = format!("subsets[{}]", subset.name);
            if subset.name.is_empty() {
                problems.add(path.clone(), "has no name");
            }
            let mut layer = match &subset.settings {
                Some(settings) => problems.layer(&path, settings),
                None => Layer::default(),
            };
            let name: Arc<str> = subset.name.as_str().into();
            if subsets.contains_key(&name) {
                problems.add(path, "is there twice");
                layer.invalid = problems.last_reason();
            }
            let members = subset.workloads.iter().map(|uid| uid.as_str().into());
            let members = Arc::new(members.collect());
            subsets.insert(name, Subset { layer, members });
        }
        let whole = match &policy.settings {
            Some(settings) => problems.layer("settings", settings),
            None => Layer::default(),
        };
        Self {
            host: policy.host.as_str().into(),
            whole,
            ports,
            subsets,
            invalid: (!policy.invalid.is_empty()).then(|| policy.invalid.as_str().into()),
            problems: problems.0,
        }
    }

    /// What is wrong with the resource itself, for the NACK. What the user got wrong
    /// (`invalid`) is none of it.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The settings for a port and, where given, a subset.
    ///
    /// As in Istio (`MergeSubsetTrafficPolicy`): settings of a port take the place of
    /// those of the whole host, of which then nothing is inherited; a section of a
    /// subset's settings takes the place of that section.
    ///
    /// # Errors
    ///
    /// [`PickError::UnknownSubset`]. Invalid settings are no error here: they fail when an
    /// endpoint is asked for.
    pub fn select(&self, port: u16, subset: Option<&str>) -> Result<Selection, PickError> {
        let base = self.ports.get(&port).unwrap_or(&self.whole);
        let (layer, members) = match subset {
            None => (base.clone(), None),
            Some(name) => {
                let unknown = || PickError::UnknownSubset(name.into());
                let subset = self.subsets.get(name).ok_or_else(unknown)?;
                (base.overridden_by(&subset.layer), Some(&subset.members))
            }
        };
        let mut settings = layer.into_settings();
        if let Some(reason) = &self.invalid {
            settings.invalid = Some(reason.clone());
        }
        Ok(Selection {
            settings: Arc::new(settings),
            members: members.cloned(),
        })
    }

    /// The names of its subsets.
    pub fn subsets(&self) -> impl Iterator<Item = &Arc<str>> {
        self.subsets.keys()
    }
}

impl TrafficSettings {
    /// Converts one level of settings by itself.
    pub fn from_proto(settings: &proto::TrafficSettings) -> (Self, Vec<Problem>) {
        let mut problems = Problems::default();
        let layer = problems.layer("settings", settings);
        (layer.into_settings(), problems.0)
    }
}

impl Layer {
    fn overridden_by(&self, over: &Self) -> Self {
        fn pick<T: Clone>(over: &Option<T>, base: &Option<T>) -> Option<T> {
            over.as_ref().or(base.as_ref()).cloned()
        }
        Self {
            load_balancer: pick(&over.load_balancer, &self.load_balancer),
            connection_pool: pick(&over.connection_pool, &self.connection_pool),
            outlier_detection: pick(&over.outlier_detection, &self.outlier_detection),
            tls: pick(&over.tls, &self.tls),
            retry_budget: pick(&over.retry_budget, &self.retry_budget),
            invalid: pick(&over.invalid, &self.invalid),
        }
    }

    fn into_settings(self) -> TrafficSettings {
        TrafficSettings {
            load_balancer: self.load_balancer.unwrap_or_default(),
            connection_pool: self.connection_pool.unwrap_or_default(),
            outlier_detection: self.outlier_detection,
            tls: self.tls,
            retry_budget: self.retry_budget,
            invalid: self.invalid,
        }
    }
}

/// Conversions that note what is wrong and go on.
#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, field: impl Into<String>, reason: &'static str) {
        let field = field.into();
        self.0.push(Problem { field, reason });
    }

    fn last_reason(&self) -> Option<Arc<str>> {
        self.0.last().map(|problem| problem.to_string().into())
    }

    fn layer(&mut self, path: &str, settings: &proto::TrafficSettings) -> Layer {
        let before = self.0.len();
        let mut layer = Layer {
            load_balancer: settings
                .load_balancer
                .as_ref()
                .map(|lb| self.load_balancer(&format!("{path}.load_balancer"), lb)),
            connection_pool: settings
                .connection_pool
                .as_ref()
                .map(|pool| self.connection_pool(&format!("{path}.connection_pool"), pool)),
            outlier_detection: settings
                .outlier_detection
                .as_ref()
                .map(|outlier| self.outlier(&format!("{path}.outlier_detection"), outlier)),
            tls: settings
                .tls
                .as_ref()
                .map(|tls| self.tls(&format!("{path}.tls"), tls)),
            retry_budget: settings.retry_budget.as_ref().map(|budget| RetryBudget {
                percent: self.percent(format!("{path}.retry_budget.percent"), budget.percent),
                min_retries: budget.min_retries,
            }),
            invalid: None,
        };
        layer.invalid = self.0.get(before).map(|problem| problem.to_string().into());
        layer
    }

    fn load_balancer(&mut self, path: &str, lb: &proto::LoadBalancer) -> LoadBalancer {
        use proto::load_balancer::Algorithm as Wire;
        let ring = match lb.minimum_ring_size {
            0 => DEFAULT_RING_SIZE,
            size if size <= MAX_RING_SIZE => size as u32,
            _ => {
                self.add(format!("{path}.minimum_ring_size"), "is above 8388608");
                DEFAULT_RING_SIZE
            }
        };
        let algorithm = match Wire::try_from(lb.algorithm) {
            Ok(Wire::Unspecified | Wire::LeastRequest) => Algorithm::LeastRequest,
            Ok(Wire::RoundRobin) => Algorithm::RoundRobin,
            Ok(Wire::Random) => Algorithm::Random,
            Ok(Wire::Passthrough) => Algorithm::Passthrough,
            Ok(Wire::RingHash) => Algorithm::RingHash {
                minimum_ring_size: ring,
            },
            Ok(Wire::Maglev) => Algorithm::Maglev,
            Err(_) => {
                self.add(format!("{path}.algorithm"), "is not known");
                Algorithm::LeastRequest
            }
        };
        let hash_key = lb
            .hash_key
            .as_ref()
            .and_then(|key| self.hash_key(path, key));
        if algorithm.is_consistent_hash() && hash_key.is_none() {
            self.add(
                format!("{path}.hash_key"),
                "is needed for consistent hashing",
            );
        }
        let panic_threshold = lb.panic_threshold_set.then(|| {
            self.whole_percent(
                format!("{path}.panic_threshold_percent"),
                lb.panic_threshold_percent,
            )
        });
        LoadBalancer {
            algorithm,
            hash_key,
            slow_start: self.slow_start(path, lb),
            locality: lb.locality_enabled.then(|| self.locality(path, lb)),
            panic_threshold,
        }
    }

    fn hash_key(&mut self, path: &str, key: &proto::load_balancer::HashKey) -> Option<HashKey> {
        use proto::load_balancer::HashKey as Wire;
        match key {
            Wire::Header(name) => match name.parse() {
                Ok(name) => return Some(HashKey::Header(name)),
                Err(_) => self.add(format!("{path}.header"), "is no header name"),
            },
            Wire::Cookie(cookie) => {
                // What would break out of the Set-Cookie header that is made of it.
                let bad = |c: char| c.is_control() || c == ';';
                let name_is_token = cookie.name.parse::<http::HeaderName>().is_ok();
                if !name_is_token {
                    self.add(format!("{path}.cookie.name"), "is no token");
                } else if !cookie.path.is_ascii() || cookie.path.contains(bad) {
                    self.add(format!("{path}.cookie.path"), "is no cookie path");
                } else {
                    let ttl = cookie.ttl.as_ref();
                    return Some(HashKey::Cookie(HashCookie {
                        name: cookie.name.as_str().into(),
                        path: cookie.path.as_str().into(),
                        ttl: ttl.map(|ttl| self.duration(format!("{path}.cookie.ttl"), ttl)),
                    }));
                }
            }
            Wire::SourceIp(true) => return Some(HashKey::SourceIp),
            Wire::SourceIp(false) => {}
            Wire::QueryParameter(name) if name.is_empty() => {
                self.add(format!("{path}.query_parameter"), "is empty");
            }
            Wire::QueryParameter(name) => {
                return Some(HashKey::QueryParameter(name.as_str().into()));
            }
        }
        None
    }

    fn slow_start(&mut self, path: &str, lb: &proto::LoadBalancer) -> Option<SlowStart> {
        let window = self.duration(format!("{path}.warmup"), lb.warmup.as_ref()?);
        let aggression = match lb.warmup_aggression {
            0.0 => 1.0,
            // Istio demands at least 1; Envoy anything above zero.
            value if value.is_finite() && value > 0.0 => value,
            _ => {
                self.add(format!("{path}.warmup_aggression"), "is not above zero");
                1.0
            }
        };
        let minimum_percent = self.whole_percent(
            format!("{path}.warmup_minimum_percent"),
            lb.warmup_minimum_percent,
        );
        (!window.is_zero()).then_some(SlowStart {
            window,
            aggression,
            minimum_percent,
        })
    }

    fn locality(&mut self, path: &str, lb: &proto::LoadBalancer) -> LocalityPolicy {
        if lb.distribute.is_empty() {
            let failover = lb.failover.iter();
            return LocalityPolicy::Failover(
                failover
                    .map(|step| (step.from.as_str().into(), step.to.as_str().into()))
                    .collect(),
            );
        }
        let mut distributions = Vec::new();
        for (at, distribution) in lb.distribute.iter().enumerate() {
            let sum: u64 = distribution
                .to
                .values()
                .map(|share| u64::from(*share))
                .sum();
            if sum == 0 {
                self.add(format!("{path}.distribute[{at}].to"), "has no shares");
            }
            let to = distribution.to.iter();
            distributions.push(Distribution {
                from: LocalityPattern::new(&distribution.from),
                to: to
                    .map(|(to, share)| (LocalityPattern::new(to), *share))
                    .collect(),
            });
        }
        LocalityPolicy::Distribute(distributions)
    }

    fn connection_pool(&mut self, path: &str, pool: &proto::ConnectionPool) -> ConnectionPool {
        use proto::connection_pool::H2Upgrade;
        let defaults = ConnectionPool::default();
        let mut duration = |name: &str, value: &Option<prost_types::Duration>| {
            value
                .as_ref()
                .map(|value| self.duration(format!("{path}.{name}"), value))
        };
        // Envoy's zero idle timeout is none.
        let idle = |value: Option<Duration>, default| match value {
            None => default,
            Some(Duration::ZERO) => None,
            some => some,
        };
        let connect_timeout = duration("connect_timeout", &pool.connect_timeout);
        let tcp_idle = duration("tcp_idle_timeout", &pool.tcp_idle_timeout);
        let http_idle = duration("http_idle_timeout", &pool.http_idle_timeout);
        let max_age = duration("max_connection_duration", &pool.max_connection_duration);
        let protocol = match H2Upgrade::try_from(pool.h2_upgrade) {
            _ if pool.use_client_protocol => UpstreamProtocol::Client,
            Ok(H2Upgrade::Default) => UpstreamProtocol::Declared,
            Ok(H2Upgrade::DoNotUpgrade) => UpstreamProtocol::DoNotUpgrade,
            Ok(H2Upgrade::Upgrade) => UpstreamProtocol::Http2,
            Err(_) => {
                self.add(format!("{path}.h2_upgrade"), "is not known");
                UpstreamProtocol::Declared
            }
        };
        if connect_timeout == Some(Duration::ZERO) {
            self.add(format!("{path}.connect_timeout"), "is zero");
        }
        ConnectionPool {
            max_connections: NonZeroU32::new(pool.max_connections),
            connect_timeout: connect_timeout.unwrap_or(defaults.connect_timeout),
            tcp_idle_timeout: idle(tcp_idle, defaults.tcp_idle_timeout),
            max_pending_requests: NonZeroU32::new(pool.max_pending_requests),
            max_requests: NonZeroU32::new(pool.max_requests),
            max_requests_per_connection: NonZeroU32::new(pool.max_requests_per_connection),
            max_retries: NonZeroU32::new(pool.max_retries),
            http_idle_timeout: idle(http_idle, defaults.http_idle_timeout),
            protocol,
            max_concurrent_streams: NonZeroU32::new(pool.max_concurrent_streams),
            max_connection_duration: idle(max_age, None),
        }
    }

    fn outlier(&mut self, path: &str, outlier: &proto::OutlierDetection) -> OutlierDetection {
        let defaults = OutlierDetection::default();
        let set = |set: bool, value: u32, default: u32| if set { value } else { default };
        // Envoy demands an interval above zero; a zero ejection would do nothing.
        let mut positive = |name: &str, value: &Option<prost_types::Duration>, default| {
            let Some(value) = value else { return default };
            let field = format!("{path}.{name}");
            match self.duration(field.clone(), value) {
                Duration::ZERO => {
                    self.add(field, "is zero");
                    default
                }
                value => value,
            }
        };
        let interval = positive("interval", &outlier.interval, defaults.interval);
        let base_ejection_time = positive(
            "base_ejection_time",
            &outlier.base_ejection_time,
            defaults.base_ejection_time,
        );
        let max_ejection_percent = match outlier.max_ejection_percent_set {
            true => self.whole_percent(
                format!("{path}.max_ejection_percent"),
                outlier.max_ejection_percent,
            ),
            false => defaults.max_ejection_percent,
        };
        let local = outlier.consecutive_local_origin_failures;
        OutlierDetection {
            consecutive_5xx: set(
                outlier.consecutive_5xx_set,
                outlier.consecutive_5xx,
                defaults.consecutive_5xx,
            ),
            consecutive_gateway_errors: set(
                outlier.consecutive_gateway_errors_set,
                outlier.consecutive_gateway_errors,
                defaults.consecutive_gateway_errors,
            ),
            consecutive_local_origin_failures: set(
                local > 0,
                local,
                defaults.consecutive_local_origin_failures,
            ),
            split_local_origin_errors: outlier.split_external_local_origin_errors,
            interval,
            base_ejection_time,
            max_ejection_percent,
            min_health_percent: self.whole_percent(
                format!("{path}.min_health_percent"),
                outlier.min_health_percent,
            ),
        }
    }

    fn tls(&mut self, path: &str, tls: &proto::ClientTls) -> ClientTls {
        use proto::client_tls::Mode;
        let mode = match Mode::try_from(tls.mode) {
            Ok(Mode::Disable) => TlsMode::Disable,
            Ok(Mode::Simple) => TlsMode::Simple,
            Ok(Mode::Mutual) => TlsMode::Mutual,
            Ok(Mode::IstioMutual) => TlsMode::IstioMutual,
            Err(_) => {
                self.add(format!("{path}.mode"), "is not known");
                TlsMode::Disable
            }
        };
        let names = tls.subject_alt_names.iter();
        ClientTls {
            mode,
            sni: tls.sni.as_str().into(),
            subject_alt_names: names.map(|name| name.as_str().into()).collect(),
            ca_certificates: tls.ca_certificates.as_str().into(),
            system_roots: tls.system_roots,
            insecure_skip_verify: tls.insecure_skip_verify,
            client_secret: tls.client_secret.as_str().into(),
            invalid: (!tls.invalid.is_empty()).then(|| tls.invalid.as_str().into()),
        }
    }

    fn duration(&mut self, field: String, value: &prost_types::Duration) -> Duration {
        adit_shared::proto::duration(value).unwrap_or_else(|| {
            self.add(field, "is no positive duration");
            Duration::ZERO
        })
    }

    fn percent(&mut self, field: String, value: f64) -> f64 {
        if (0.0..=100.0).contains(&value) {
            return value;
        }
        self.add(field, "is not between 0 and 100");
        0.0
    }

    fn whole_percent(&mut self, field: String, value: u32) -> u8 {
        self.percent(field, f64::from(value)) as u8
    }
}

impl LocalityPattern {
    /// Parses `region/zone/subzone`.
    pub fn new(text: &str) -> Self {
        let mut parts = text.splitn(3, '/').map(|part| match part {
            "" | "*" => None,
            part => Some(part.into()),
        });
        Self {
            parts: std::array::from_fn(|_| parts.next().flatten()),
        }
    }
}
