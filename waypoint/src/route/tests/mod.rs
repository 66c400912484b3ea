//! Tables that cite the specification, and properties against oracles that share no code.

mod convert;
