//! Tables and properties of the headers.
