//! Delta ADS: the state machines of a client and of a server, and the client's
//! connection.
