//! Packed weights on disk: what one run has packed the next one maps.
//!
//! A file is a head, sections and a table. The head names everything that the bytes follow from: this format, the layout
//! of panels, the types, and the [identity](Checkpoint::identity) of the source. Sections are the tensors in the order in
//! which [`assemble`] asks for them, each at a multiple of [`MARGIN`] with as many bytes behind it. The table at the end
//! lists them. Nothing that a file says is believed: the reader knows which head, which offsets and which table there must
//! be, and a file that differs from them in a single byte, or in its length, is packed anew. So no content can lead
//! outside the file. What the sections hold is not summed up again at every start.
//!
//! A file is written under another name, made read-only and renamed, and never changed afterwards; there is one for
//! each source and pair of types, so that a changed source replaces what was kept of it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use batchmax_kernels::gemm::{Packed, WeightFormat};
use batchmax_kernels::mapped::{MARGIN, Mapped};
use batchmax_sim::op::DType;
use batchmax_sim::units::Bytes;
use tempfile::NamedTempFile;

use super::{Reading, Source, Weights, assemble, host_type, stacked};
use crate::error::ExecError;
use crate::load::{Checkpoint, LoadError, Role};
use crate::machine;

const MAGIC: [u8; 8] = *b"bmaxpack";
/// Stands for heads, tables and the order of bytes; panels have a number of their own.
const VERSION: u32 = 1;
/// What files in the making are called.
const UNFINISHED: &str = ".packing-";

/// What came of looking for packed weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// They were there.
    Found,
    /// They were packed, and are kept for the next time.
    Written {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: Bytes,
        /// Why a file that was there could not be used, if one was.
        instead: Option<String>,
    },
    /// They were packed and can't be kept: why.
    NotKept(String),
}

impl Weights {
    /// The same as [`Self::load`], by way of a file in `directory`: mapped where an earlier call has left one of this
    /// checkpoint and these types, else written for the next. A file that can't be used or written is no error.
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub fn load_kept(
        checkpoint: &Checkpoint,
        dtype: DType,
        head: DType,
        directory: &Path,
    ) -> Result<(Self, Keeping), ExecError> {
        let (mut weights, keeping) =
            Self::load_held(checkpoint, host_type(dtype), head, directory)?;
        weights.narrow = dtype == DType::Fp8;
        Ok((weights, keeping))
    }

    fn load_held(
        checkpoint: &Checkpoint,
        dtype: DType,
        head: DType,
        directory: &Path,
    ) -> Result<(Self, Keeping), ExecError> {
        let names = Names::of(checkpoint, dtype, head, directory)?;
        let instead = match File::open(&names.path) {
            Ok(file) => match read(&file, &names.head, checkpoint, dtype, head) {
                Ok(weights) => return Ok((weights, Keeping::Found)),
                Err(why) => Some(why),
            },
            Err(_) => None,
        };
        // What leaves the page cache before it is used again would be written for nothing.
        let (needed, all) = (dtype.bytes(checkpoint.model().parameters()), machine::memory());
        if all.0 > 0 && needed > Bytes(all.0 / 4) {
            let why = format!("{needed} are more than a quarter of the memory, {all}");
            return Ok((Self::load(checkpoint, dtype, head)?, Keeping::NotKept(why)));
        }
        let mut writing = Writing::new(checkpoint, directory, &names.head);
        let weights = assemble(checkpoint, dtype, head, &mut writing)?;
        let keeping = match writing.finish(&names.path) {
            Ok(bytes) => Keeping::Written { path: names.path, bytes, instead },
            Err(problem) => Keeping::NotKept(format!("{}: {problem}", directory.display())),
        };
        Ok((weights, keeping))
    }
}

/// Where the weights of a checkpoint are kept, and what such a file begins with.
struct Names {
    path: PathBuf,
    head: Vec<u8>,
}

impl Names {
    fn of(
        checkpoint: &Checkpoint,
        dtype: DType,
        head: DType,
        directory: &Path,
    ) -> Result<Self, LoadError> {
        let name = format!("{}-{dtype}-{head}.packed", checkpoint.file_name());
        let order = if cfg!(target_endian = "little") { "little" } else { "big" };
        let text = format!(
            "panels {}, {order}-endian\nweights {dtype}, head {head}\n{}",
            Packed::LAYOUT,
            checkpoint.identity()?
        );
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend((text.len() as u64).to_le_bytes());
        head.extend(text.into_bytes());
        Ok(Self { path: directory.join(name), head })
    }
}

/// Where the next section begins behind so many bytes.
fn next_section(at: usize) -> usize {
    at.next_multiple_of(MARGIN)
}

/// Where the next thing may begin behind a section that ends here.
fn behind_section(end: usize) -> usize {
    end.next_multiple_of(MARGIN) + MARGIN
}

/// A line of the table.
fn entry(roles: &[Role], layer: Option<u32>, what: &str, start: usize, bytes: usize) -> String {
    let layer = layer.map_or_else(|| "-".to_owned(), |l| l.to_string());
    format!("{layer} {roles:?} {what} {start} {bytes}\n")
}

fn matrix_entry(packed: &Packed, roles: &[Role], layer: Option<u32>, start: usize) -> String {
    let what = format!("{} x {} {:?}", packed.n(), packed.k(), packed.format());
    entry(roles, layer, &what, start, packed.bytes())
}

/// The weights of a file, or why it is not one of those with this head.
fn read(
    file: &File,
    head: &[u8],
    checkpoint: &Checkpoint,
    dtype: DType,
    head_dtype: DType,
) -> Result<Weights, String> {
    // On some systems nothing can be mapped of an empty file.
    let bytes = file.metadata().map_err(|e| e.to_string())?.len();
    if bytes < head.len() as u64 {
        return Err(format!("{bytes} bytes are too few"));
    }
    let file = Arc::new(Mapped::open(file).map_err(|e| e.to_string())?);
    let begins = &file.bytes()[..head.len()];
    if begins != head {
        let fixed = MAGIC.len() + size_of_val(&VERSION);
        return Err(if begins[..MAGIC.len()] != MAGIC {
            "it holds no packed weights".to_owned()
        } else if begins[..fixed] != head[..fixed] {
            "it is of another version".to_owned()
        } else {
            "the model's file or the layout has changed".to_owned()
        });
    }
    let mut mapping = Mapping { checkpoint, file, at: head.len(), table: String::new() };
    let weights = assemble(checkpoint, dtype, head_dtype, &mut mapping);
    let weights = weights.map_err(|_| "it is cut off".to_owned())?;
    if mapping.file.bytes()[mapping.at..] != *mapping.table.as_bytes() {
        return Err("its table or its length is another".to_owned());
    }
    Ok(weights)
}

/// Takes tensors from a file, one behind the other.
struct Mapping<'a> {
    checkpoint: &'a Checkpoint,
    file: Arc<Mapped>,
    /// Bytes that have been taken.
    at: usize,
    table: String,
}

impl Mapping<'_> {
    /// The file ends too early.
    fn cut(&self) -> ExecError {
        let problem = io::ErrorKind::UnexpectedEof.into();
        ExecError::Io { path: self.checkpoint.path().to_owned(), problem }
    }

    /// Goes on behind a section of so many bytes, if the file goes on so far.
    fn pass(&mut self, start: usize, bytes: usize) -> Result<(), ExecError> {
        let end = start.checked_add(bytes).map(behind_section);
        self.at = end.filter(|end| *end <= self.file.bytes().len()).ok_or_else(|| self.cut())?;
        Ok(())
    }
}

impl Source for Mapping<'_> {
    fn matrix(
        &mut self,
        format: WeightFormat,
        roles: &[Role],
        layer: Option<u32>,
    ) -> Result<Packed, ExecError> {
        let (n, k) = stacked(self.checkpoint, roles, layer)?;
        let start = next_section(self.at);
        let packed = Packed::mapped(n, k, format, &self.file, start).ok_or_else(|| self.cut())?;
        self.table += &matrix_entry(&packed, roles, layer, start);
        self.pass(start, packed.bytes())?;
        Ok(packed)
    }

    fn vector(&mut self, roles: &[Role], layer: Option<u32>) -> Result<Vec<f32>, ExecError> {
        let mut count = 0;
        for role in roles {
            count += self.checkpoint.shape(*role, layer)?.map_or(0, |(_, columns)| columns);
        }
        let (start, bytes) = (next_section(self.at), count * size_of::<f32>());
        self.pass(start, bytes)?;
        self.table += &entry(roles, layer, "vector", start, bytes);
        let raw = &self.file.bytes()[start..start + bytes];
        Ok(raw.as_chunks().0.iter().map(|raw| f32::from_ne_bytes(*raw)).collect())
    }
}

/// Reads and packs, and writes what was packed.
struct Writing<'a> {
    reading: Reading<'a>,
    /// The file in the making; what went wrong with it.
    file: io::Result<BufWriter<NamedTempFile>>,
    /// Bytes that have been written.
    at: usize,
    table: String,
}

impl<'a> Writing<'a> {
    fn new(checkpoint: &'a Checkpoint, directory: &Path, head: &[u8]) -> Self {
        let begin = || {
            fs::create_dir_all(directory)?;
            sweep(directory);
            let file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(directory)?;
            let mut file = BufWriter::with_capacity(1 << 20, file);
            file.write_all(head)?;
            Ok(file)
        };
        let (file, at) = (begin(), head.len());
        Self { reading: Reading(checkpoint), file, at, table: String::new() }
    }

    /// Writes a section whose beginning was taken from [`next_section`].
    fn put(&mut self, start: usize, bytes: &[u8]) {
        let end = start + bytes.len();
        let (before, behind) = (start - self.at, behind_section(end) - end);
        let zeros = [0; 2 * MARGIN];
        self.attempt(|file| {
            file.write_all(&zeros[..before])?;
            file.write_all(bytes)?;
            file.write_all(&zeros[..behind])
        });
        self.at = behind_section(end);
    }

    /// Goes on writing, unless something has gone wrong.
    fn attempt(&mut self, write: impl FnOnce(&mut BufWriter<NamedTempFile>) -> io::Result<()>) {
        if let Ok(file) = &mut self.file
            && let Err(problem) = write(file)
        {
            // The unfinished file goes with its handle.
            self.file = Err(problem);
        }
    }

    /// Gives the file its name, and says how long it is.
    fn finish(mut self, path: &Path) -> io::Result<Bytes> {
        let table = std::mem::take(&mut self.table);
        self.attempt(|file| file.write_all(table.as_bytes()));
        let file = self.file?.into_inner().map_err(io::IntoInnerError::into_error)?;
        let mut permissions = file.as_file().metadata()?.permissions();
        permissions.set_readonly(true);
        file.as_file().set_permissions(permissions)?;
        // After a power cut there must not be a name without content.
        file.as_file().sync_data()?;
        let bytes = file.as_file().metadata()?.len();
        file.persist(path).map_err(|e| e.error)?;
        Ok(Bytes(bytes))
    }
}

impl Source for Writing<'_> {
    fn matrix(
        &mut self,
        format: WeightFormat,
        roles: &[Role],
        layer: Option<u32>,
    ) -> Result<Packed, ExecError> {
        let packed = self.reading.matrix(format, roles, layer)?;
        let start = next_section(self.at);
        self.table += &matrix_entry(&packed, roles, layer, start);
        self.put(start, packed.panels());
        Ok(packed)
    }

    fn vector(&mut self, roles: &[Role], layer: Option<u32>) -> Result<Vec<f32>, ExecError> {
        let values = self.reading.vector(roles, layer)?;
        let raw: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        let start = next_section(self.at);
        self.table += &entry(roles, layer, "vector", start, raw.len());
        self.put(start, &raw);
        Ok(values)
    }
}

/// Removes what runs that were killed have left unfinished. What can't be removed is left to the next sweep.
fn sweep(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
        let changed = entry.metadata().and_then(|about| about.modified()).ok();
        let age = changed.and_then(|at| at.elapsed().ok());
        if unfinished && age.is_some_and(|age| age > Duration::from_hours(24)) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

#[cfg(test)]
mod tests;
