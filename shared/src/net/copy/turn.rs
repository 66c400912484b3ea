//! How much to read at once: 16 KiB until the app fills it, then more, up to 1 MiB.

use crate::hbone::buffer::SizeClass;

/// Bytes that one poll may move in one direction before other connections get their turn.
pub(super) const POLL_BUDGET: usize = 1 << 20;

/// Below this, bytes are copied into an allocation of their size, so that a small message that
/// waits for a window does not hold a whole buffer.
pub(super) const SMALL: usize = 2048;

/// The size of the next read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn(SizeClass);

impl Default for Turn {
    fn default() -> Self {
        Self::new()
    }
}

impl Turn {
    pub(super) const fn new() -> Self {
        Self(SizeClass::Kib16)
    }

    pub(super) const fn class(self) -> SizeClass {
        self.0
    }

    /// Learns from a read of `n` bytes into room for `room`.
    pub(super) fn learn(&mut self, n: usize, room: usize) {
        if n >= self.0.bytes() {
            self.0 = self.0.larger();
        } else if n < room && n <= self.0.smaller().bytes() {
            // A read that was cut short by its room says nothing about the app.
            self.0 = self.0.smaller();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_grow_while_they_are_filled_and_shrink_when_they_are_not() {
        let steps = [
            // (bytes read, room, size of the next turn)
            (1, 16 << 10, 16 << 10),
            (16 << 10, 16 << 10, 64 << 10),
            (64 << 10, 64 << 10, 256 << 10),
            (256 << 10, 256 << 10, 1 << 20),
            (1 << 20, 1 << 20, 1 << 20),
            (300 << 10, 1 << 20, 1 << 20),
            // The window or the pool allowed no more than this.
            (16 << 10, 16 << 10, 1 << 20),
            (200 << 10, 1 << 20, 256 << 10),
            (10, 256 << 10, 64 << 10),
            (10, 64 << 10, 16 << 10),
            (10, 16 << 10, 16 << 10),
        ];
        let mut turn = Turn::new();
        for (n, room, next) in steps {
            turn.learn(n, room);
            assert_eq!(turn.class().bytes(), next, "after {n} of {room}");
        }
    }
}
