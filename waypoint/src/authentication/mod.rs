//! Who the end user is: JSON Web Tokens.
