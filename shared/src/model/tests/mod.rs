//! Tables for each decision, and the indexes against a scan of everything.

mod balance;
mod convert;
mod inbound;
mod lookup;
mod rebuild;
mod route;
mod shared;
mod wire;
