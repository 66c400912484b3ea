//! Files that others read and write at the same time.
//!
//! A reader sees the old text or the new one. A writer that comes between our reading and
//! our writing is not overwritten: the files change places, and if the one that comes out is
//! not the one that was read, its text is what the next round starts from.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::{InstallError, io_error};

/// A file that is written all the time is left, as its owner wrote it last, until the next look.
const MAX_ROUNDS: usize = 8;
/// Giving the owner's text back takes some microseconds, in which there may be a newer one.
const MAX_RETURNS: usize = 1000;

/// Puts `text` in the place of a file.
pub(super) fn replace(path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    let temporary = write_beside(path, text, mode)?;
    fs::rename(&temporary, path).inspect_err(|_| remove(&temporary))
}

/// Changes the text of a file; the path if it was changed. `change` says `None` if the text
/// is as it should be.
pub(super) fn update(
    path: &Path,
    change: impl Fn(&[u8]) -> Result<Option<String>, InstallError>,
) -> Result<Option<PathBuf>, InstallError> {
    let mut text = fs::read(path).map_err(io_error("read", path))?;
    let mode = fs::metadata(path)
        .map_err(io_error("read", path))?
        .permissions()
        .mode();
    // What stands in the file, unless somebody else writes it.
    let mut there = text.clone();
    for round in 0..MAX_ROUNDS {
        let new = match change(&text) {
            Ok(Some(new)) => new.into_bytes(),
            Ok(None) if round == 0 => return Ok(None),
            // The newer text came out of the file and goes back as it is.
            Ok(None) => text.clone(),
            Err(error) if round == 0 => return Err(error),
            Err(error) => {
                replace(path, &text, mode & 0o777).map_err(io_error("write", path))?;
                return Err(error);
            }
        };
        let temporary = write_beside(path, &new, mode & 0o777).map_err(io_error("write", path))?;
        if let Err(error) = exchange(&temporary, path) {
            remove(&temporary);
            return Err(io_error("replace", path)(error));
        }
        match fs::read(&temporary) {
            Ok(before) if before == there => {
                remove(&temporary);
                return Ok(Some(path.to_owned()));
            }
            // Written by its owner in between: theirs is the newer one.
            Ok(newer) if round + 1 < MAX_ROUNDS => {
                remove(&temporary);
                (text, there) = (newer, new);
            }
            Ok(_) => {
                give_back(path, &temporary, new).map_err(io_error("give back", path))?;
                break;
            }
            // The file system cannot exchange, or somebody cleans up after us.
            Err(_) => return Ok(Some(path.to_owned())),
        }
    }
    let busy = io::Error::new(io::ErrorKind::ResourceBusy, "it is written all the time");
    Err(io_error("change", path)(busy))
}

/// Puts the owner's file, which came out for `ours`, back in its place, or a newer one that
/// came meanwhile.
fn give_back(path: &Path, owners: &Path, ours: Vec<u8>) -> io::Result<()> {
    let mut there = ours;
    for _ in 0..MAX_RETURNS {
        let given = fs::read(owners)?;
        exchange(owners, path)?;
        if fs::read(owners)? == there {
            remove(owners);
            return Ok(());
        }
        there = given;
    }
    remove(owners);
    Err(io::ErrorKind::ResourceBusy.into())
}

/// Lets the two files change places; where the file system cannot, the first takes the
/// second's.
fn exchange(new: &Path, path: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, new, AT_FDCWD, path, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => Ok(()),
        Err(nix::Error::EINVAL | nix::Error::ENOSYS) => fs::rename(new, path),
        Err(error) => Err(error.into()),
    }
}

/// A name that no runtime takes for a configuration or a plugin.
fn write_beside(path: &Path, text: &[u8], mode: u32) -> io::Result<PathBuf> {
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".adit-new");
    let temporary = path.with_file_name(name);
    remove(&temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)?;
    let written = file
        .write_all(text)
        // The mode of `open` passes the umask.
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(mode)))
        .and_then(|()| file.sync_all());
    match written {
        Ok(()) => {
            sync_directory(path);
            Ok(temporary)
        }
        Err(error) => {
            remove(&temporary);
            Err(error)
        }
    }
}

fn sync_directory(path: &Path) {
    // A node that loses power has the old file or the new one either way.
    if let Some(Ok(directory)) = path.parent().map(File::open) {
        let _ = directory.sync_all();
    }
}

fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_writer_in_between_is_not_overwritten() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("10-net.conflist");
        fs::write(&path, "old").expect("written");
        let rounds = Cell::new(0);
        let changed = update(&path, |text| {
            rounds.set(rounds.get() + 1);
            if rounds.get() == 1 {
                // Its owner writes while we think.
                replace(&path, b"newer", 0o644).expect("written");
            }
            let text = String::from_utf8_lossy(text);
            Ok((!text.ends_with("+ours")).then(|| format!("{text}+ours")))
        });
        assert_eq!(changed.expect("done"), Some(path.clone()));
        assert_eq!(fs::read_to_string(&path).expect("there"), "newer+ours");
        assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 1);
    }

    #[test]
    fn an_owner_that_writes_all_the_time_has_its_last_word() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("10-net.conflist");
        fs::write(&path, "0").expect("written");
        let rounds = Cell::new(0);
        let changed = update(&path, |text| {
            rounds.set(rounds.get() + 1);
            replace(&path, rounds.get().to_string().as_bytes(), 0o644).expect("written");
            Ok(Some(format!("{}+ours", String::from_utf8_lossy(text))))
        });
        assert!(changed.is_err(), "it is not changed");
        assert_eq!(rounds.get(), MAX_ROUNDS);
        let left = fs::read_to_string(&path).expect("there");
        assert_eq!(left, MAX_ROUNDS.to_string());
        assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 1);
    }

    #[test]
    fn a_file_keeps_its_mode_and_a_good_one_is_left() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("10-net.conflist");
        replace(&path, b"old", 0o640).expect("written");
        update(&path, |_| Ok(Some("new".into()))).expect("done");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(update(&path, |_| Ok(None)).expect("done"), None);
        assert!(update(&directory.path().join("none"), |_| Ok(None)).is_err());
    }
}
