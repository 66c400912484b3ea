//! From the accepted tunnel to the endpoint and back.
