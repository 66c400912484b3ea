//! What cannot be understood answers 500 and is listed.
