//! Log lines leave the process on a thread of their own, so that a slow terminal or a
//! full pipe never holds up a worker: lines beyond the bound are dropped and counted.
//!
//! Producers append to one buffer under a short lock; the thread takes the whole buffer
//! and writes it with one call. It naps between two writes, so that a busy proxy pays
//! for two hundred wake-ups a second rather than one for each line, unless so much comes
//! meanwhile that the buffers would grow.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Lines that may wait.
const MAX_LINES: usize = 10_000;
/// Bytes that may wait.
const MAX_BYTES: usize = 16 << 20;
/// Room for lines that is kept whatever is written.
const KEPT: usize = 64 << 10;
/// Pause of the thread between two writes.
const NAP: Duration = Duration::from_millis(5);
/// So many bytes end the pause: more lines in one write would not be cheaper, and what waits for
/// it is memory.
const FULL: usize = 128 << 10;

/// A handle to the writing thread. Clones share it.
#[derive(Clone)]
pub struct LogWriter {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    filled: Condvar,
    emptied: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    lines: usize,
    /// The thread is writing what it took.
    writing: bool,
    /// The thread waits for so many bytes.
    awaited: Option<usize>,
}

impl LogWriter {
    /// Starts a thread that writes to `out`.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        Self::start_with_nap(out, NAP)
    }

    fn start_with_nap(out: impl Write + Send + 'static, nap: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = shared.clone();
        std::thread::Builder::new()
            .name("log".into())
            .spawn(move || thread.run(out, nap))?;
        Ok(Self { shared })
    }

    /// Queues `line`, which ends in a newline. Never blocks on I/O.
    pub fn write_line(&self, line: &[u8]) {
        let mut buffer = self.shared.buffer.lock();
        if buffer.lines >= MAX_LINES || buffer.bytes.len() + line.len() > MAX_BYTES {
            drop(buffer);
            self.shared.dropped.fetch_add(1, Relaxed);
            return;
        }
        buffer.bytes.extend_from_slice(line);
        buffer.lines += 1;
        let enough = buffer
            .awaited
            .is_some_and(|bytes| buffer.bytes.len() >= bytes);
        if enough {
            buffer.awaited = None;
        }
        drop(buffer);
        if enough {
            self.shared.filled.notify_one();
        }
    }

    /// How many lines were dropped because the output was too slow.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    /// Waits until what was queued before is written, at most `deadline`. Says whether
    /// it was.
    pub fn flush(&self, deadline: Duration) -> bool {
        let until = Instant::now() + deadline;
        let mut buffer = self.shared.buffer.lock();
        while buffer.lines > 0 || buffer.writing {
            if self
                .shared
                .emptied
                .wait_until(&mut buffer, until)
                .timed_out()
            {
                return buffer.lines == 0 && !buffer.writing;
            }
        }
        true
    }
}

impl Shared {
    fn run(&self, mut out: impl Write, nap: Duration) {
        let mut taken = Vec::new();
        let mut reported = 0;
        loop {
            {
                let mut buffer = self.buffer.lock();
                while buffer.lines == 0 {
                    buffer.awaited = Some(1);
                    self.filled.wait(&mut buffer);
                }
                buffer.awaited = None;
                std::mem::swap(&mut buffer.bytes, &mut taken);
                buffer.lines = 0;
                buffer.writing = true;
            }
            let dropped = self.dropped.load(Relaxed);
            if dropped > reported {
                let note = format!("{} log lines were dropped\n", dropped - reported);
                taken.extend_from_slice(note.as_bytes());
                reported = dropped;
            }
            // There is nowhere to report a failure of the log itself.
            let _ = out.write_all(&taken).and_then(|()| out.flush());
            // A burst leaves no lasting mark on the memory, and a steady load does not have its
            // buffers made anew two hundred times a second.
            let used = taken.len();
            taken.clear();
            if taken.capacity() > used.saturating_mul(4).max(KEPT) {
                taken.shrink_to(used.saturating_mul(2));
            }
            let mut buffer = self.buffer.lock();
            buffer.writing = false;
            self.emptied.notify_all();
            let until = Instant::now() + nap;
            while buffer.bytes.len() < FULL {
                buffer.awaited = Some(FULL);
                if self.filled.wait_until(&mut buffer, until).timed_out() {
                    break;
                }
            }
        }
    }
}

/// One log event at a time, queued when it is complete.
pub struct Line<'a> {
    writer: &'a LogWriter,
    bytes: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.bytes.is_empty() {
            self.writer.write_line(&self.bytes);
            self.bytes.clear();
        }
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        // Only hands over to the thread.
        let _ = self.flush();
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for LogWriter {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            writer: self,
            bytes: Vec::with_capacity(256),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hands out what was written, and blocks while `gate` is locked.
    #[derive(Clone, Default)]
    struct Output {
        written: Arc<Mutex<Vec<u8>>>,
        gate: Arc<Mutex<()>>,
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _open = self.gate.lock();
            self.written.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn writes_in_order_and_flushes() {
        let output = Output::default();
        let writer = LogWriter::start(output.clone()).expect("thread");
        for n in 0..100 {
            writer.write_line(format!("line {n}\n").as_bytes());
        }
        assert!(writer.flush(SOON));
        let expected: String = (0..100).map(|n| format!("line {n}\n")).collect();
        assert_eq!(*output.written.lock(), expected.as_bytes());
    }

    #[test]
    fn a_full_buffer_ends_the_pause() {
        let output = Output::default();
        let hour = Duration::from_secs(3600);
        let writer = LogWriter::start_with_nap(output.clone(), hour).expect("thread");
        let begin = Instant::now();
        let wait_for = |length| {
            while output.written.lock().len() < length {
                assert!(begin.elapsed() < SOON, "nobody takes what is there");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        writer.write_line(b"x\n");
        wait_for(2);
        // A little waits, and goes with what fills the buffer.
        let line = [b'x'; FULL / 4];
        for written in 1..=8 {
            writer.write_line(&line);
            wait_for(2 + written / 4 * FULL);
        }
        assert_eq!(output.written.lock().len(), 2 + 2 * FULL);
    }

    #[test]
    fn drops_and_counts_rather_than_block() {
        let output = Output::default();
        let writer = LogWriter::start(output.clone()).expect("thread");
        let closed = output.gate.lock();
        // The thread may take one batch before the output blocks.
        let lines = 3 * MAX_LINES as u64;
        for _ in 0..lines {
            writer.write_line(b"x\n");
        }
        let dropped = writer.dropped();
        assert!(dropped >= lines - 2 * MAX_LINES as u64, "{dropped}");
        assert!(!writer.flush(Duration::from_millis(20)));
        drop(closed);
        assert!(writer.flush(SOON));
        let written = output.written.lock();
        let lines_written = written
            .split(|b| *b == b'\n')
            .filter(|l| *l == b"x")
            .count();
        assert_eq!(lines_written as u64, lines - dropped);
        assert!(String::from_utf8_lossy(&written).contains("log lines were dropped"));
    }
}
