//! Which rule of which route a request takes, and what the rule does to it: pure.
//!
//! [`Route`] is one user object, understood once ([`Route::from_proto`]). All routes of a
//! service make its [`ServiceRoutes`]: one [`HttpTable`] or [`L4Table`] for each port, chosen by
//! the port that was dialled and the namespace of the caller, never by the Host header.
//! [`HttpTable::find`] gives the best match of a request, whose [`Rule`] says what happens:
//! filters, a backend by weight, timeouts, retries, session persistence.
//!
//! Nothing here knows sockets, clocks or a source of randomness; they are arguments.

mod attach;
mod backend;
mod claims;
mod convert;
mod deadline;
mod filter;
mod index;
mod matching;
mod problem;
mod query;
mod retry;
mod rule;
mod session;
mod table;
#[cfg(test)]
mod tests;
mod text;

pub use attach::{PortRoutes, ServiceRoutes};
pub use backend::{Backend, BackendError, Backends, Target};
pub use claims::{Claims, NoClaims};
pub use deadline::{GrpcTimeoutError, format_grpc_timeout, parse_grpc_timeout};
pub use filter::{
    Answer, AnswerReason, AuthProtocol, CorsGrant, DirectResponse, ExternalAuth, Fault, Filters,
    Inspection, Listener, Mirror, RewriteError,
};
pub use matching::{MatchedPath, RequestView};
pub use problem::Problem;
pub use retry::{Attempt, RetryDecision, RetryOn, RetryPolicy};
pub use rule::{L4Rule, Route, RouteId, RouteKind, Rule, Timeouts};
pub use session::{Session, SessionError, SessionKey, SessionPersistence, SessionType};
pub use table::{HttpTable, L4Table, Lookup, Matched};
