//! What the control plane has sent, compiled into one immutable view for the request path.
