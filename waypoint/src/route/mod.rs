//! Which rule of which route a request takes, and what the rule does to it: pure.
