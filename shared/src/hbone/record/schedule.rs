//! The key schedule that rustls keeps for us after the handshake.

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, Error};

use super::error::RecordError;

/// Derives the next keys, and takes session tickets.
pub(super) enum KeySchedule {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

impl KeySchedule {
    /// The next key of the direction in which we send.
    pub(super) fn next_tx(&mut self) -> Result<ConnectionTrafficSecrets, RecordError> {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
        .map(|(_, secrets)| secrets)
        .map_err(|_| KEY_SCHEDULE)
    }

    /// The next key of the direction in which we receive.
    pub(super) fn next_rx(&mut self) -> Result<ConnectionTrafficSecrets, RecordError> {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
        .map(|(_, secrets)| secrets)
        .map_err(|_| KEY_SCHEDULE)
    }

    /// Hands a ticket to the session store of the configuration, which decides whether it is
    /// kept. A client may not send one (RFC 8446 4.6.1).
    pub(super) fn store_ticket(&mut self, payload: &[u8]) -> Result<(), RecordError> {
        match self {
            Self::Client(kernel) => match kernel.handle_new_session_ticket(payload) {
                Ok(()) => Ok(()),
                Err(Error::InvalidMessage(_)) => Err(RecordError::Decode("NewSessionTicket")),
                Err(_) => Err(RecordError::IllegalParameter("NewSessionTicket")),
            },
            Self::Server(_) => Err(RecordError::UnexpectedMessage("NewSessionTicket")),
        }
    }
}

const KEY_SCHEDULE: RecordError = RecordError::Internal("the key schedule failed");
