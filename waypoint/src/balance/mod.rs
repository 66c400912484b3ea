//! Which endpoint a request goes to, and whether it may go anywhere now: pure.
