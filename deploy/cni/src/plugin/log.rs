//! The plugin's own log: a file of the node, for what a runtime hides. What fails a sandbox
//! is told to the runtime as well.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::SystemTime;

/// Beyond this the file is put aside, and the one put aside before is removed.
const MAX_SIZE: u64 = 1 << 20;

/// Appends lines to a file; an empty path means nowhere.
pub(super) struct Log(Option<PathBuf>);

impl Log {
    pub(super) fn new(path: &str) -> Self {
        Self((!path.is_empty()).then(|| path.into()))
    }

    /// Writes a line. A log that cannot be written fails no sandbox.
    pub(super) fn line(&self, text: &str) {
        let Some(path) = &self.0 else {
            return;
        };
        if fs::metadata(path).is_ok_and(|file| file.len() > MAX_SIZE) {
            let mut aside = path.clone().into_os_string();
            aside.push(".1");
            let _ = fs::rename(path, aside);
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path);
        if let Ok(mut file) = file {
            let seconds = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_secs());
            let time = humantime_of(seconds);
            // One call to write: lines of processes that run at once stay whole.
            let _ = file.write_all(format!("{time} {text}\n").as_bytes());
        }
    }
}

/// Seconds since 1970 as RFC 3339 in UTC (Howard Hinnant's `civil_from_days`).
fn humantime_of(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_written_as_everybody_writes_it() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_795_276_799, "2026-11-21T15:59:59Z"),
        ] {
            assert_eq!(humantime_of(seconds), text);
        }
    }

    #[test]
    fn a_log_that_grew_is_put_aside() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("log");
        fs::write(&path, vec![b'x'; MAX_SIZE as usize + 1]).expect("written");
        let log = Log::new(path.to_str().expect("text"));
        log.line("one");
        log.line("two");
        let text = fs::read_to_string(&path).expect("there");
        assert_eq!(text.lines().count(), 2);
        assert!(text.ends_with("two\n"));
        assert!(directory.path().join("log.1").exists());
        Log::new("").line("nowhere");
        Log::new("/nowhere/at/all").line("nor there");
    }
}
