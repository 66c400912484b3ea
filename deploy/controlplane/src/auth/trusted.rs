//! The service accounts of node proxies (Istio's `CA_TRUSTED_NODE_ACCOUNTS`). They alone get
//! certificates for other pods of their node, see what to enrol, and report what they did.

use std::collections::BTreeSet;
use std::str::FromStr;

use super::Caller;

/// Namespaces and names of service accounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedAccounts(BTreeSet<(String, String)>);

impl TrustedAccounts {
    /// Whether the caller is one of them.
    pub fn contains(&self, caller: &Caller) -> bool {
        self.names(&caller.namespace, &caller.service_account)
    }

    /// Whether a service account is one of them.
    pub fn names(&self, namespace: &str, service_account: &str) -> bool {
        self.0
            .iter()
            .any(|(of, name)| of == namespace && name == service_account)
    }
}

/// `istio-system/ztunnel`.
impl Default for TrustedAccounts {
    fn default() -> Self {
        Self([("istio-system".to_owned(), "ztunnel".to_owned())].into())
    }
}

/// `namespace/name`, several separated by commas; empty trusts nobody.
impl FromStr for TrustedAccounts {
    type Err = TrustedAccountsError;

    fn from_str(text: &str) -> Result<Self, TrustedAccountsError> {
        text.split(',')
            .map(str::trim)
            .filter(|account| !account.is_empty())
            .map(|account| match account.split_once('/') {
                Some((namespace, name))
                    if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
                {
                    Ok((namespace.to_owned(), name.to_owned()))
                }
                _ => Err(TrustedAccountsError(account.to_owned())),
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// Not `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a service account: namespace/name is needed")]
pub struct TrustedAccountsError(String);

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(namespace: &str, service_account: &str) -> Caller {
        Caller {
            namespace: namespace.into(),
            service_account: service_account.into(),
            pod_name: "p".into(),
            pod_uid: "u".into(),
            node: "n".into(),
        }
    }

    #[test]
    fn a_list_is_read_and_compared_whole() {
        let trusted: TrustedAccounts = "istio-system/ztunnel, mesh/node".parse().expect("legal");
        assert!(trusted.contains(&caller("mesh", "node")));
        assert!(trusted.contains(&caller("istio-system", "ztunnel")));
        assert!(!trusted.contains(&caller("istio-system", "node")));
        assert!(!trusted.contains(&caller("default", "ztunnel")));
        assert_eq!(
            "".parse::<TrustedAccounts>()
                .map(|t| t.contains(&caller("", ""))),
            Ok(false)
        );
        for bad in ["ztunnel", "/ztunnel", "istio-system/", "a/b/c"] {
            assert!(bad.parse::<TrustedAccounts>().is_err(), "{bad}");
        }
    }
}
