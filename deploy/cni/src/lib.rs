//! The chained CNI plugin, and the node agent that installs it.
#![forbid(unsafe_code)]
