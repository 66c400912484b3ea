//! Objects to resources.
