//! Against a real API server, named by `ADIT_TEST_KUBECONFIG`: an empty one of its own, with
//! the controllers for service accounts and namespaces and without a mesh, because what is
//! tested belongs to the whole cluster. Without that variable these tests say that they were
//! skipped, and pass.

#[path = "../support/mod.rs"]
mod support;

mod authority;
mod cluster;
mod program;
mod source;
mod webhook;
