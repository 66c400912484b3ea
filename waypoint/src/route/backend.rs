//! Where a rule's requests go: backends by weight.

use std::sync::Arc;

use adit_shared::model::ServiceName;

use super::filter::Filters;

/// The backends of a rule with their shares.
#[derive(Debug, Clone, Default)]
pub struct Backends {
    backends: Box<[Share]>,
    total: u64,
}

#[derive(Debug, Clone)]
struct Share {
    /// Sum of the weights up to and with this one.
    until: u64,
    backend: Result<Backend, Arc<str>>,
}

/// One backend that requests can be sent to.
#[derive(Debug, Clone)]
pub struct Backend {
    target: Target,
    filters: Filters,
}

/// The endpoints of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Which service. Its endpoints are meant: its own routes are not consulted.
    pub service: ServiceName,
    /// Port of the service.
    pub port: u16,
    /// Subset of a DestinationRule.
    pub subset: Option<Arc<str>>,
}

/// Why a request has no backend. It is answered with 500, a connection is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// the rule has no backends
    #[error("the rule has no backends")]
    None,
    /// all backends have weight 0
    #[error("all backends have weight 0")]
    ZeroWeight,
    /// the chosen backend is invalid
    #[error("invalid backend: {0}")]
    Invalid(Arc<str>),
}

impl Backends {
    pub(super) fn new(backends: Vec<(u32, Result<Backend, Arc<str>>)>) -> Self {
        let mut total = 0;
        let shares = backends.into_iter().map(|(weight, backend)| {
            total += u64::from(weight);
            Share {
                until: total,
                backend,
            }
        });
        let backends = shares.collect();
        Self { backends, total }
    }

    /// The backend of one request: each in proportion to its weight (Gateway API
    /// BackendRef.weight), invalid ones included. `random` is uniform over all values.
    ///
    /// # Errors
    ///
    /// There is none, or the chosen one is invalid.
    pub fn choose(&self, random: u64) -> Result<&Backend, BackendError> {
        // A fixed-point product in place of a remainder: no bias worth naming, no division.
        let drawn = ((u128::from(random) * u128::from(self.total)) >> 64) as u64;
        match self.backends.iter().find(|share| drawn < share.until) {
            Some(share) => match &share.backend {
                Ok(backend) => Ok(backend),
                Err(reason) => Err(BackendError::Invalid(Arc::clone(reason))),
            },
            None if self.backends.is_empty() => Err(BackendError::None),
            None => Err(BackendError::ZeroWeight),
        }
    }

    /// Whether there is no backend at all, valid or not.
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty()
    }

    /// The backends that requests can be sent to, whatever their weight.
    pub fn valid(&self) -> impl Iterator<Item = &Backend> {
        self.backends
            .iter()
            .filter_map(|share| share.backend.as_ref().ok())
    }
}

impl Backend {
    pub(super) fn new(target: Target, filters: Filters) -> Self {
        Self { target, filters }
    }

    /// Where the requests go.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What is done to them on the way, after the rule's own filters.
    pub fn filters(&self) -> &Filters {
        &self.filters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(name: &str) -> Backend {
        let service = ServiceName {
            namespace: "n".into(),
            hostname: name.into(),
        };
        let target = Target {
            service,
            port: 80,
            subset: None,
        };
        Backend::new(target, Filters::default())
    }

    fn count(backends: &Backends) -> [u32; 4] {
        let mut counts = [0; 4];
        for step in 0..1000_u64 {
            let random = u64::MAX / 2000 * (2 * step + 1);
            let slot = match backends.choose(random) {
                Ok(backend) if &*backend.target().service.hostname == "a" => 0,
                Ok(_) => 1,
                Err(BackendError::Invalid(_)) => 2,
                Err(_) => 3,
            };
            counts[slot] += 1;
        }
        counts
    }

    #[test]
    fn shares_follow_weights_and_invalid_backends_keep_theirs() {
        let invalid = || Err(Arc::from("gone"));
        // MeshHTTPRouteWeight: 70/30/0.
        let backends = vec![
            (70, Ok(backend("a"))),
            (30, Ok(backend("b"))),
            (0, invalid()),
        ];
        assert_eq!(count(&Backends::new(backends)), [700, 300, 0, 0]);
        let backends = vec![(0, Ok(backend("a"))), (1, invalid()), (3, Ok(backend("b")))];
        assert_eq!(count(&Backends::new(backends)), [0, 750, 250, 0]);
        let backends = vec![(u32::MAX, Ok(backend("a"))), (u32::MAX, Ok(backend("b")))];
        assert_eq!(count(&Backends::new(backends)), [500, 500, 0, 0]);
        assert_eq!(
            count(&Backends::new(vec![(0, Ok(backend("a")))])),
            [0, 0, 0, 1000]
        );
        assert_eq!(count(&Backends::default()), [0, 0, 0, 1000]);
    }

    #[test]
    fn the_ends_of_the_random_range() {
        let backends = Backends::new(vec![(1, Ok(backend("a"))), (1, Ok(backend("b")))]);
        let name = |random| {
            let chosen = backends.choose(random).expect("chosen");
            chosen.target().service.hostname.to_string()
        };
        assert_eq!(name(0), "a");
        assert_eq!(name(u64::MAX), "b");
    }
}
