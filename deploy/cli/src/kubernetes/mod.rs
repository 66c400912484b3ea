//! A Kubernetes cluster as commands see it: objects, and the pods of the mesh with their
//! admin endpoints.
//!
//! Commands are synchronous. A [`Kubernetes`] owns a small runtime of one thread, which
//! runs only while a call waits for the API server.

mod config;
mod discovery;
mod error;
mod forward;
mod objects;
mod pods;

pub use config::{ConnectionArgs, Found, KubernetesArgs, find, no_cluster};
pub use forward::PodPort;
pub use pods::{PodView, Role};

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use kube::Client;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use self::discovery::Resources;
use self::forward::Session;

/// Field manager of what the command line applies.
pub const FIELD_MANAGER: &str = "adit-cli";

/// A connection to a cluster's API server.
#[derive(Clone)]
pub struct Kubernetes(Rc<Inner>);

struct Inner {
    // Dropped first: its tasks run on the runtime.
    client: Client,
    sessions: RefCell<HashMap<PodPort, Session>>,
    resources: RefCell<Option<Rc<Resources>>>,
    context: String,
    server: String,
    default_namespace: String,
    istio_namespace: String,
    deadline: Duration,
    runtime: Runtime,
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kubernetes")
            .field("context", &self.0.context)
            .field("server", &self.0.server)
            .finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// Connects as the flags, the environment and the kubeconfig say. Nothing is sent yet.
    ///
    /// # Errors
    /// When there is no kubeconfig, or none that can be used; the file and the context are
    /// named.
    pub fn open(args: &KubernetesArgs) -> anyhow::Result<Self> {
        Self::connect(&args.connection, &args.istio_namespace)
    }

    /// The same, with the control plane's namespace from elsewhere.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn connect(args: &ConnectionArgs, istio_namespace: &str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime")?;
        // Another one that is there already is as good.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let chosen = runtime.block_on(config::load(args))?;
        let server = chosen.config.cluster_url.to_string();
        let default_namespace = chosen.config.default_namespace.clone();
        let client = {
            let _on_the_runtime = runtime.enter();
            Client::try_from(chosen.config)
                .with_context(|| format!("{} cannot be used", chosen.context))?
        };
        Ok(Self(Rc::new(Inner {
            client,
            sessions: RefCell::default(),
            resources: RefCell::default(),
            context: chosen.context,
            server: server.trim_end_matches('/').to_owned(),
            default_namespace,
            istio_namespace: istio_namespace.to_owned(),
            deadline: args.kubeclient_timeout,
            runtime,
        })))
    }

    /// Which cluster it is, for people: `context "kind"`.
    pub fn name(&self) -> &str {
        &self.0.context
    }

    /// The namespace that the context names, else `default`.
    pub fn default_namespace(&self) -> &str {
        &self.0.default_namespace
    }

    /// The namespace of the control plane.
    pub fn istio_namespace(&self) -> &str {
        &self.0.istio_namespace
    }

    /// The client, for use within [`Self::block_on`].
    pub fn client(&self) -> &Client {
        &self.0.client
    }

    /// Runs a future to its end. It has to have a deadline of its own.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.0.runtime.block_on(future)
    }

    /// Waits for one answer of the API server, at most as long as `--kubeclient-timeout`
    /// says. `what` completes "cannot ..." for people.
    ///
    /// # Errors
    /// One sentence, see the module `error`.
    pub async fn call<T>(
        &self,
        what: impl Fn() -> String,
        request: impl Future<Output = kube::Result<T>>,
    ) -> anyhow::Result<T> {
        match timeout(self.0.deadline, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.explain(error, &what())),
            Err(_) => Err(self.too_late()),
        }
    }

    /// The version of the API server, for example `v1.33.1`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn server_version(&self) -> anyhow::Result<String> {
        let ask = self.0.client.apiserver_version();
        let what = || "ask for the version of the API server".to_owned();
        Ok(self.block_on(self.call(what, ask))?.git_version)
    }
}
