//! Ztunnels as the command line sees them: where they are, what their admin endpoint says.

pub mod admin;
pub mod dump;
pub mod merge;
pub mod names;
pub mod serial;
pub mod target;
