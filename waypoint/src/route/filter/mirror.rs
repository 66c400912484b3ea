//! RequestMirror.

use super::super::backend::Target;
use super::hit;

/// HTTPRequestMirrorFilter: copies of requests go to one endpoint of the target.
#[derive(Debug, Clone)]
pub struct Mirror {
    pub(in crate::route) target: Target,
    pub(in crate::route) per_million: u32,
}

impl Mirror {
    /// Where the copies go.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Whether one request is copied. `random` is uniform over all values, and drawn for each
    /// mirror by itself.
    pub fn takes(&self, random: u64) -> bool {
        hit(self.per_million, random)
    }
}
