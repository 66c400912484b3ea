//! The control plane: reads what users wrote, compiles it for the proxies, serves it.

pub mod analyze;
pub mod compile;
pub mod model;
pub mod source;
