//! The validating webhook: the API server asks before it stores an object of the mesh's
//! kinds, and is told by the same code that reads manifests and that `adit analyze` runs.
//!
//! Refused is what could not be in force as written. What is only suspicious (a name that
//! leads nowhere yet, an unusual port name) is a warning, which `kubectl` prints.

mod ca_bundle;
mod port;
mod review;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

pub use ca_bundle::CaBundles;
pub(crate) use port::Port;
pub use port::WebhookLimits;

use crate::analyze::{Code, Finding, Severity, analyze};
use crate::compile::MeshConfig;
use crate::model::{Object, Objects};
use crate::source::SourceState;

use self::port::SMALL;
use self::review::Question;

/// Where the API server asks.
pub const PATH: &str = "/validate";
/// For looking at the surroundings of an object. The API server waits for ten seconds.
const ANALYSIS_DEADLINE: Duration = Duration::from_secs(3);
/// Questions that are parsed and judged at a time.
const MAX_JUDGING: u32 = 4;
/// In larger meshes objects are looked at by themselves only.
const MAX_ANALYSED_PODS: usize = 20_000;
/// `kubectl` prints each on a line of its own.
const MAX_WARNINGS: usize = 8;

/// A webhook and where it listens.
#[derive(Debug, Clone)]
pub struct Webhook {
    /// Its address; HTTPS.
    pub listen: SocketAddr,
    /// What it says.
    pub admission: Admission,
    /// The bounds of its port.
    pub limits: WebhookLimits,
}

/// Decides about objects. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Admission {
    source: watch::Receiver<SourceState>,
    mesh: Arc<MeshConfig>,
    /// What is parsed and judged at a time: JSON takes many times its length in memory. A
    /// large question counts for all.
    judging: Arc<Semaphore>,
    /// One analysis at a time: it takes a core for a while.
    analysis: Arc<Semaphore>,
}

impl Admission {
    /// Objects are looked at among those of `source`.
    pub fn new(source: watch::Receiver<SourceState>, mesh: MeshConfig) -> Self {
        Self {
            source,
            mesh: Arc::new(mesh),
            judging: Arc::new(Semaphore::new(MAX_JUDGING as usize)),
            analysis: Arc::new(Semaphore::new(1)),
        }
    }

    /// Answers an `AdmissionReview` with one.
    ///
    /// # Errors
    /// In words, if it is none.
    pub(crate) async fn review(&self, body: Bytes) -> Result<Vec<u8>, String> {
        let (question, mut answer, object) = {
            let weight = if body.len() > SMALL { MAX_JUDGING } else { 1 };
            // The semaphore is never closed.
            let _turn = self.judging.acquire_many(weight).await;
            let question = Question::parse(&body)?;
            drop(body);
            let (answer, object) = question.judge();
            (question, answer, object)
        };
        if let Some(object) = object
            && answer.allowed()
        {
            for finding in self.warnings(object).await {
                answer.warn(&finding);
            }
        }
        tracing::debug!(question = %question, allowed = answer.allowed(), "admission");
        answer.encode(&question)
    }

    /// What is to be said about an object among the others; nothing if that takes too long.
    async fn warnings(&self, object: Object) -> Vec<Finding> {
        let state = self.source.borrow().clone();
        let pods: usize = state
            .objects
            .namespaces
            .values()
            .map(|of| of.pods.len())
            .sum();
        if !state.synced || pods > MAX_ANALYSED_PODS {
            return Vec::new();
        }
        let mesh = self.mesh.clone();
        let analysis = self.analysis.clone();
        let found = timeout(ANALYSIS_DEADLINE, async move {
            // The semaphore is never closed.
            let slot = analysis.acquire_owned().await.ok();
            tokio::task::spawn_blocking(move || {
                let _slot = slot;
                about(object, state.objects, &mesh)
            })
            .await
        });
        match found.await {
            Ok(Ok(findings)) => findings,
            Ok(Err(error)) => {
                tracing::error!(%error, "analysing an object ended by a defect");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }
}

fn about(object: Object, mut objects: Objects, mesh: &MeshConfig) -> Vec<Finding> {
    let reference = object.reference();
    objects.set(&reference, Some(object));
    let mut findings = analyze(&objects, mesh);
    findings.retain(|finding| {
        finding.object.as_ref() == Some(&reference)
            && finding.severity >= Severity::Warning
            // Service accounts are not followed, so those without pods look missing.
            && !(finding.code == Code::ReferencedResourceNotFound
                && finding.field.to_ascii_lowercase().contains("serviceaccounts["))
    });
    findings.truncate(MAX_WARNINGS);
    findings
}
