//! Tables that cite the rules, an oracle that says the same in the slowest way, and paths.

mod bypass;
mod convert;
mod normalize;
mod oracle;
mod request;
mod store;
mod support;
mod table;
