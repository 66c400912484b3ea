//! Envoy's response flags.

/// Envoy's response flags, as a set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ResponseFlags(u32);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal $short:literal;)*) => {
        impl ResponseFlags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            /// Every flag with its short name, in Envoy's order.
            pub const ALL: &[(Self, &str)] = &[$((Self::$name, $short)),*];
        }
    };
}

flags! {
    /// No healthy endpoint.
    NO_HEALTHY_UPSTREAM = 0 "UH";
    /// Connecting to the endpoint failed.
    UPSTREAM_CONNECTION_FAILURE = 1 "UF";
    /// A limit of connections, pending requests or requests is reached.
    UPSTREAM_OVERFLOW = 2 "UO";
    /// No route matches.
    NO_ROUTE = 3 "NR";
    /// Every attempt has failed.
    RETRY_LIMIT_EXCEEDED = 4 "URX";
    /// The route's backend does not exist.
    NO_CLUSTER = 5 "NC";
    /// The client went away.
    DOWNSTREAM_TERMINATION = 6 "DC";
    /// We reset the request.
    LOCAL_RESET = 7 "LR";
    /// The endpoint reset the request.
    UPSTREAM_RESET = 8 "UR";
    /// The connection to the endpoint ended.
    UPSTREAM_TERMINATION = 9 "UC";
    /// The request's time was over.
    UPSTREAM_TIMEOUT = 10 "UT";
    /// A configured delay was injected.
    DELAY_INJECTED = 11 "DI";
    /// A configured fault was injected.
    FAULT_INJECTED = 12 "FI";
    /// A rate limit.
    RATE_LIMITED = 13 "RL";
    /// External authorization denied, or could not be asked.
    UNAUTHORIZED_EXTERNAL = 14 "UAEX";
    /// The stream was idle for too long.
    STREAM_IDLE_TIMEOUT = 15 "SI";
    /// The client broke the protocol.
    DOWNSTREAM_PROTOCOL_ERROR = 16 "DPE";
    /// The endpoint broke the protocol.
    UPSTREAM_PROTOCOL_ERROR = 17 "UPE";
    /// The endpoint's answer was the last of `max_stream_duration`.
    MAX_DURATION = 18 "UMSDR";
    /// Too much for this process.
    OVERLOAD = 19 "OM";
}

impl ResponseFlags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// Whether no flag is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` are set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Appends the short names, comma-separated; `-` for none.
    pub fn write(self, out: &mut String) {
        if self.is_empty() {
            out.push('-');
            return;
        }
        let start = out.len();
        for (flag, name) in Self::ALL {
            if self.contains(*flag) {
                if out.len() > start {
                    out.push(',');
                }
                out.push_str(name);
            }
        }
    }
}

impl std::ops::BitOr for ResponseFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for ResponseFlags {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}
