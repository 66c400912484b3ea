//! What must not be seen: the key of sessions, certificates with their keys. It is kept apart
//! from the other resources, and nothing here can be shown.

use std::collections::HashMap;
use std::sync::Arc;

use adit_shared::proto::waypoint as pb;

use crate::proxy::upstream::ClientIdentity;
use crate::route::SessionKey;

/// The secret that seals the tokens of sessions.
const SESSION_KEY: &str = "session-key";

/// All secrets that the control plane has given.
#[derive(Default)]
pub(super) struct Secrets {
    session_key: Option<Arc<SessionKey>>,
    clients: HashMap<String, ClientIdentity>,
}

impl Secrets {
    /// Takes one.
    ///
    /// # Errors
    /// What is wrong with it; the one before it stays.
    pub(super) fn upsert(&mut self, name: &str, secret: &pb::Secret) -> Result<(), String> {
        if name == SESSION_KEY {
            let key: &[u8; 32] = (&*secret.session_key)
                .try_into()
                .map_err(|_| "session_key: does not have 32 bytes")?;
            let key = SessionKey::new(key).map_err(|error| error.to_string())?;
            self.session_key = Some(Arc::new(key));
            return Ok(());
        }
        let client = ClientIdentity::from_pem(&secret.certificate_chain, &secret.private_key)?;
        self.clients.insert(name.to_owned(), client);
        Ok(())
    }

    /// Forgets one.
    pub(super) fn remove(&mut self, name: &str) {
        match name {
            SESSION_KEY => self.session_key = None,
            name => drop(self.clients.remove(name)),
        }
    }

    pub(super) fn session_key(&self) -> Option<&Arc<SessionKey>> {
        self.session_key.as_ref()
    }

    /// The certificate in a secret.
    pub(super) fn client(&self, name: &str) -> Option<&ClientIdentity> {
        self.clients.get(name)
    }
}
