//! The authority of the moment: keys are rotated while the control plane runs.

use std::sync::Arc;

use adit_shared::identity::LocalCa;
use tokio::sync::watch;

/// An authority that may be replaced by another. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CurrentCa {
    receiver: watch::Receiver<Arc<LocalCa>>,
}

impl CurrentCa {
    /// Follows `receiver`.
    pub fn new(receiver: watch::Receiver<Arc<LocalCa>>) -> Self {
        Self { receiver }
    }

    /// The one to sign with now.
    pub fn get(&self) -> Arc<LocalCa> {
        self.receiver.borrow().clone()
    }

    /// Returns when there is another than at the last call, or than when this value was
    /// made. An authority that cannot change never does.
    pub async fn changed(&mut self) {
        if self.receiver.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl From<Arc<LocalCa>> for CurrentCa {
    /// An authority that does not change.
    fn from(ca: Arc<LocalCa>) -> Self {
        Self::new(watch::channel(ca).1)
    }
}
