//! Comes with the data path.
