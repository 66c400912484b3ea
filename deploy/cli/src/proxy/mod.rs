//! Waypoints as commands see them: which one is meant, and what its dump says.

pub mod dump;
pub mod target;
