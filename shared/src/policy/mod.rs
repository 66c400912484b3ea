//! Authorization: the model of a policy and its evaluation. Pure: values in, a
//! verdict out; no clock, no I/O, no async.
