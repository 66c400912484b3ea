//! The authority whose key is in a Secret: `cacerts` if an operator plugs one in, else
//! `istio-ca-secret`, which the first replica makes.
//!
//! All replicas watch the Secrets and come to the same decision ([rotation](super::rotation)).
//! A Secret that cannot be used never replaces an authority that can.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use adit_shared::identity::{CaFiles, LocalCa, LocalCaError, TrustDomain};
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, DeleteParams, PostParams};
use kube::runtime::utils::Backoff as _;
use kube::runtime::watcher::{self, DefaultBackoff};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::CurrentCa;
use super::rotation::{Previous, RotationTimes, Step, step};
use super::secret::{
    OWN_SECRET, PLUGGED_SECRET, PREVIOUS_SECRET, files, own_secret, previous, previous_secret,
};
use crate::kubernetes::{FIELD_MANAGER, Kubernetes, explain};

const NAMES: [&str; 3] = [PLUGGED_SECRET, OWN_SECRET, PREVIOUS_SECRET];
/// For one answer of the API server.
const DEADLINE: Duration = Duration::from_secs(15);
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(5);
/// A clock may be set; nothing is waited for longer without a look.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// An authority that follows the cluster's Secrets. Dropping it ends that; the authority of
/// the moment stays.
#[derive(Debug)]
pub struct ClusterCa {
    current: CurrentCa,
    /// Its only member.
    task: JoinSet<()>,
}

/// What is known of the Secrets; no entry: nothing yet.
type Secrets = BTreeMap<&'static str, Option<Secret>>;

impl ClusterCa {
    /// Waits until there is an authority, and makes one where there is none. What stands in
    /// the way is logged until it is gone.
    ///
    /// Must be called within a tokio runtime.
    pub async fn start(
        kubernetes: &Kubernetes,
        trust_domain: TrustDomain,
        times: RotationTimes,
    ) -> Result<Self, ClusterCaError> {
        let (first, mut ready) = mpsc::channel(1);
        let follower = Follower {
            api: Api::namespaced(kubernetes.client.clone(), &kubernetes.namespace),
            namespace: kubernetes.namespace.clone(),
            trust_domain,
            times,
            in_force: None,
            ended: None,
            rotating_to: None,
            publish: None,
            first,
            told: String::new(),
        };
        let mut task = JoinSet::new();
        task.spawn(follower.run());
        let receiver = ready.recv().await.ok_or(ClusterCaError::Ended)?;
        Ok(Self {
            current: CurrentCa::new(receiver),
            task,
        })
    }

    /// The authority to sign with, whose roots are the trust bundle.
    pub fn current(&self) -> CurrentCa {
        self.current.clone()
    }

    /// Returns when the Secrets are not followed any more, which comes about by a defect only.
    pub async fn ended(&mut self) {
        if let Some(Err(error)) = self.task.join_next().await {
            tracing::error!(%error, "the certificate authority is not followed any more");
        }
    }
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum ClusterCaError {
    /// By a defect, which has been logged.
    #[error("the Secrets of the certificate authority are not followed any more")]
    Ended,
}

struct Follower {
    api: Api<Secret>,
    namespace: Arc<str>,
    trust_domain: TrustDomain,
    times: RotationTimes,
    in_force: Option<CaFiles>,
    /// The authority for which a rotation was ended by hand.
    ended: Option<String>,
    rotating_to: Option<String>,
    publish: Option<watch::Sender<Arc<LocalCa>>>,
    first: mpsc::Sender<watch::Receiver<Arc<LocalCa>>>,
    /// The last complaint; the same one is not repeated.
    told: String,
}

impl Follower {
    async fn run(mut self) {
        let (changes, mut changed) = mpsc::channel(16);
        let mut watches = JoinSet::new();
        for name in NAMES {
            watches.spawn(follow_secret(self.api.clone(), name, changes.clone()));
        }
        let mut secrets = Secrets::new();
        let mut again: Option<Duration> = None;
        loop {
            let wait = async {
                match again {
                    Some(wait) => sleep(wait.min(LOOK_AGAIN)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                change = changed.recv() => {
                    let Some((name, secret)) = change else { return };
                    secrets.insert(name, secret);
                }
                () = wait => {}
            }
            if secrets.len() < NAMES.len() {
                continue;
            }
            again = match self.look(&secrets).await {
                Ok(next) => {
                    self.told.clear();
                    next.map(|at| {
                        at.duration_since(SystemTime::now())
                            .unwrap_or_default()
                            .max(Duration::from_millis(100))
                    })
                }
                Err(complaint) => {
                    if complaint != self.told {
                        tracing::error!("certificate authority: {complaint}");
                        self.told = complaint;
                    }
                    Some(RETRY)
                }
            };
        }
    }

    /// Does what the Secrets call for; gives when to look again.
    async fn look(&mut self, secrets: &Secrets) -> Result<Option<SystemTime>, String> {
        let secret = |name| secrets.get(name).and_then(Option::as_ref);
        let (name, wanted) = match (secret(PLUGGED_SECRET), secret(OWN_SECRET)) {
            (Some(plugged), _) => (PLUGGED_SECRET, plugged),
            (None, Some(own)) => (OWN_SECRET, own),
            // The watch will show it, ours or that of a faster replica.
            (None, None) => return self.make().await.map(|()| None),
        };
        let wanted = files(wanted).map_err(|error| {
            let consequence = match self.in_force {
                Some(_) => "the one in force stays",
                None => "there is none to serve with",
            };
            format!("Secret {}/{name}: {error}; {consequence}", self.namespace)
        })?;
        let before = match secret(PREVIOUS_SECRET).map(previous).transpose() {
            Ok(before) => before,
            Err(error) => {
                return Err(format!(
                    "Secret {}/{PREVIOUS_SECRET}: {error}; delete it to end the rotation at once",
                    self.namespace
                ));
            }
        };
        self.note_end(before.as_ref(), &wanted);
        let next = step(
            &wanted,
            self.in_force.as_ref(),
            before.as_ref(),
            self.ended.as_deref(),
            self.times,
            SystemTime::now(),
        );
        match next {
            Step::Use(files, next) => {
                self.put_in_force(files)
                    .map_err(|error| error.to_string())?;
                Ok(next)
            }
            Step::Begin(previous) => {
                self.write_previous(&previous, secret(PREVIOUS_SECRET))
                    .await?;
                tracing::info!(
                    announce = ?self.times.announce,
                    retire = ?self.times.retire,
                    "another certificate authority: its root is announced before it signs"
                );
                Ok(None)
            }
            Step::Finish(files) => {
                self.put_in_force(files)
                    .map_err(|error| error.to_string())?;
                self.remove_previous().await?;
                tracing::info!("the certificate authority before this one is trusted no more");
                Ok(None)
            }
        }
    }

    /// A rotation that was under way and of which nothing is written any more has been ended.
    fn note_end(&mut self, previous: Option<&Previous>, wanted: &CaFiles) {
        let is_wanted = |next: &String| *next == wanted.certificate;
        match previous {
            Some(previous) => self.rotating_to = Some(previous.next.clone()),
            None => {
                let rotating_to = self.rotating_to.take();
                self.ended = rotating_to.or(self.ended.take()).filter(is_wanted);
            }
        }
    }

    fn put_in_force(&mut self, files: CaFiles) -> Result<(), LocalCaError> {
        let same = self.in_force.as_ref().is_some_and(|known| {
            (&known.certificate, &known.key, &known.chain, &known.roots)
                == (&files.certificate, &files.key, &files.chain, &files.roots)
        });
        if same {
            return Ok(());
        }
        let ca = Arc::new(LocalCa::from_files(&files)?);
        tracing::info!(
            roots = files.roots.matches("BEGIN CERTIFICATE").count(),
            "certificate authority in force"
        );
        self.in_force = Some(files);
        match &self.publish {
            Some(publish) => {
                publish.send_replace(ca);
            }
            None => {
                let (publish, receiver) = watch::channel(ca);
                self.publish = Some(publish);
                // There is room for one, and it is the first.
                let _ = self.first.try_send(receiver);
            }
        }
        Ok(())
    }

    /// Creates and never replaces: of two replicas one loses, and reads the other's.
    async fn make(&self) -> Result<(), String> {
        let ca = LocalCa::generate(&self.trust_domain).map_err(|error| error.to_string())?;
        let secret = own_secret(&self.namespace, &ca.to_files());
        match within(self.api.create(&post(), &secret)).await {
            Ok(_) => {
                tracing::info!("a certificate authority has been made: Secret {OWN_SECRET}");
                Ok(())
            }
            Err(Failure::Api(error)) if is(&error, 409) => Ok(()),
            Err(failure) => Err(failure.explain("create")),
        }
    }

    async fn write_previous(
        &self,
        previous: &Previous,
        known: Option<&Secret>,
    ) -> Result<(), String> {
        let mut secret = previous_secret(&self.namespace, previous);
        let written = match known {
            None => within(self.api.create(&post(), &secret)).await,
            Some(known) => {
                // Refused if another replica was faster.
                secret
                    .metadata
                    .resource_version
                    .clone_from(&known.metadata.resource_version);
                within(self.api.replace(PREVIOUS_SECRET, &post(), &secret)).await
            }
        };
        match written {
            Ok(_) => Ok(()),
            Err(Failure::Api(error)) if is(&error, 409) || is(&error, 404) => Ok(()),
            Err(failure) => Err(failure.explain("write")),
        }
    }

    async fn remove_previous(&self) -> Result<(), String> {
        let gone = within(self.api.delete(PREVIOUS_SECRET, &DeleteParams::default())).await;
        match gone {
            Ok(_) => Ok(()),
            Err(Failure::Api(error)) if is(&error, 404) => Ok(()),
            Err(failure) => Err(failure.explain("delete")),
        }
    }
}

fn post() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

enum Failure {
    Api(Box<kube::Error>),
    Late,
}

impl Failure {
    fn explain(&self, verb: &str) -> String {
        match self {
            Self::Api(error) => explain(verb, "secrets", error),
            Self::Late => format!("cannot {verb} secrets: no answer within {DEADLINE:?}"),
        }
    }
}

async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match timeout(DEADLINE, request).await {
        Ok(answer) => answer.map_err(|error| Failure::Api(Box::new(error))),
        Err(_) => Err(Failure::Late),
    }
}

fn is(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

/// Sends what the Secret of that name is, now and whenever it changes.
async fn follow_secret(
    api: Api<Secret>,
    name: &'static str,
    changes: mpsc::Sender<(&'static str, Option<Secret>)>,
) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut stream = std::pin::pin!(watcher::watcher(api, config));
    let mut backoff = DefaultBackoff::default();
    let mut listed = None;
    let mut told = String::new();
    while let Some(event) = stream.next().await {
        let state = match event {
            Ok(watcher::Event::Init) => {
                listed = None;
                continue;
            }
            Ok(watcher::Event::InitApply(secret)) => {
                listed = Some(secret);
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                backoff.reset();
                told.clear();
                listed.take()
            }
            Ok(watcher::Event::Apply(secret)) => Some(secret),
            Ok(watcher::Event::Delete(_)) => None,
            Err(error) => {
                let complaint = match &error {
                    watcher::Error::InitialListFailed(error) => explain("list", "secrets", error),
                    watcher::Error::WatchStartFailed(error) => explain("watch", "secrets", error),
                    error => error.to_string(),
                };
                if complaint != told {
                    tracing::warn!("Secret {name}: {complaint}");
                    told = complaint;
                }
                sleep(backoff.next().unwrap_or(RETRY)).await;
                continue;
            }
        };
        if changes.send((name, state)).await.is_err() {
            return;
        }
    }
}
