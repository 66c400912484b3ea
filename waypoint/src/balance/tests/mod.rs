//! Table tests and properties; time and randomness are made up.
