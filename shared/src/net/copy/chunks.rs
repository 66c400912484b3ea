//! Chunks that the app's socket does not take yet, written together.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf as _, Bytes};

/// Chunks per write: enough that a peer with 16 KiB frames still makes large writes.
pub(super) const GATHER: usize = 32;

/// A queue whose first chunk needs no memory besides its own: the usual message is one chunk.
#[derive(Default)]
pub(super) struct Chunks {
    /// Empty only if there is nothing at all.
    first: Bytes,
    rest: VecDeque<Bytes>,
    bytes: usize,
}

impl Chunks {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub(super) fn is_full(&self) -> bool {
        self.rest.len() + 1 >= GATHER
    }

    /// Adds a chunk, which must not be empty.
    pub(super) fn push(&mut self, chunk: Bytes) {
        self.bytes += chunk.len();
        if self.first.is_empty() {
            self.first = chunk;
        } else {
            self.rest.push_back(chunk);
        }
    }

    /// Fills `slices` from the front and returns those that are filled.
    pub(super) fn slices<'s, 'c>(
        &'c self,
        slices: &'s mut [IoSlice<'c>; GATHER],
    ) -> &'s [IoSlice<'c>] {
        let chunks = std::iter::once(&self.first).chain(&self.rest);
        let mut filled = 0;
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
            filled += 1;
        }
        &slices[..filled]
    }

    /// Forgets the first `n` bytes. Without any left it holds no memory.
    pub(super) fn advance(&mut self, n: usize) {
        let mut n = n.min(self.bytes);
        self.bytes -= n;
        while n >= self.first.len() {
            n -= self.first.len();
            match self.rest.pop_front() {
                Some(next) => self.first = next,
                None => {
                    *self = Self::default();
                    return;
                }
            }
        }
        self.first.advance(n);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_queue_of_bytes(
            steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..9), 0_usize..20), 1..60)
        ) {
            let mut chunks = Chunks::default();
            let mut model = Vec::new();
            for (chunk, consume) in steps {
                if !chunks.is_full() {
                    chunks.push(Bytes::from(chunk.clone()));
                    model.extend(chunk);
                }
                let mut slices = [IoSlice::new(&[]); GATHER];
                let seen = chunks.slices(&mut slices).iter().flat_map(|s| s.to_vec());
                prop_assert_eq!(seen.collect::<Vec<_>>(), model.clone());
                chunks.advance(consume);
                model.drain(..consume.min(model.len()));
                prop_assert_eq!(chunks.bytes(), model.len());
                prop_assert_eq!(chunks.is_empty(), model.is_empty());
            }
        }
    }
}
