//! Tables that cite the rules, and an oracle that says the same in the slowest way.

mod convert;
mod oracle;
mod table;
mod wire;
