//! Some columns of a Parquet file, flat ones only.

use std::collections::HashMap;
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;

use anyhow::{Result, anyhow, bail};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::summary::tame;

/// The tables have at most some hundred thousand rows; a file may claim any number.
const MOST_ROWS: usize = 10_000_000;
/// Rows read at a time.
const STRIDE: usize = 1 << 16;

/// A column; nulls are none.
pub enum Column {
    /// Whole numbers.
    Whole(Vec<Option<i64>>),
    /// Numbers.
    Real(Vec<Option<f64>>),
    /// Texts.
    Text(Vec<Option<Rc<str>>>),
}

/// The columns that were asked for and found.
pub struct Columns {
    columns: HashMap<String, Column>,
    /// Rows of each.
    pub rows: usize,
}

impl Columns {
    /// Reads the columns named `wanted`; `name` is for messages.
    pub fn read(name: &str, bytes: Vec<u8>, wanted: &[&str]) -> Result<Self> {
        // Decoders of damaged pages may panic; the message of the panic says nothing to people.
        let hook = panic::take_hook();
        panic::set_hook(Box::new(|_| {}));
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| read(bytes, wanted)));
        panic::set_hook(hook);
        let damaged = |why: &str| anyhow!("{name}: damaged Parquet file: {}", tame(why));
        outcome
            .map_err(|_| damaged("a page can't be decoded"))?
            .map_err(|e| damaged(&e.to_string()))
    }

    /// Fails if a column is missing.
    pub fn expect(&self, name: &str, columns: &[&str]) -> Result<()> {
        match columns.iter().find(|c| !self.columns.contains_key(**c)) {
            Some(missing) => bail!("{name}: no column \"{missing}\""),
            None => Ok(()),
        }
    }

    /// A whole number.
    pub fn whole(&self, column: &str, row: usize) -> Option<i64> {
        match self.columns.get(column)? {
            Column::Whole(values) => *values.get(row)?,
            _ => None,
        }
    }

    /// A number.
    pub fn real(&self, column: &str, row: usize) -> Option<f64> {
        match self.columns.get(column)? {
            Column::Real(values) => *values.get(row)?,
            Column::Whole(values) => values.get(row)?.map(|v| v as f64),
            Column::Text(_) => None,
        }
    }

    /// A text.
    pub fn text(&self, column: &str, row: usize) -> Option<Rc<str>> {
        match self.columns.get(column)? {
            Column::Text(values) => values.get(row)?.clone(),
            _ => None,
        }
    }
}

fn read(bytes: Vec<u8>, wanted: &[&str]) -> Result<Columns> {
    let reader = SerializedFileReader::new(bytes::Bytes::from(bytes))?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let mut columns = HashMap::new();
    let mut rows = None;
    for (i, about) in schema.columns().iter().enumerate() {
        if !wanted.contains(&about.name()) || about.max_rep_level() > 0 || about.max_def_level() > 1
        {
            continue;
        }
        let mut column = None;
        for group in 0..reader.num_row_groups() {
            append(&mut column, reader.get_row_group(group)?.get_column_reader(i)?)?;
        }
        let Some(column) = column else { continue };
        let length = match &column {
            Column::Whole(v) => v.len(),
            Column::Real(v) => v.len(),
            Column::Text(v) => v.len(),
        };
        if *rows.get_or_insert(length) != length {
            bail!("columns of different lengths");
        }
        columns.insert(about.name().to_owned(), column);
    }
    Ok(Columns { columns, rows: rows.unwrap_or(0) })
}

fn append(column: &mut Option<Column>, reader: ColumnReader) -> Result<()> {
    let other = || anyhow!("a column changes its type");
    match reader {
        ColumnReader::Int32ColumnReader(mut r) => {
            let Column::Whole(values) = column.get_or_insert(Column::Whole(Vec::new())) else {
                return Err(other());
            };
            drain(&mut r, values, |v| Ok(i64::from(*v)))
        }
        ColumnReader::Int64ColumnReader(mut r) => {
            let Column::Whole(values) = column.get_or_insert(Column::Whole(Vec::new())) else {
                return Err(other());
            };
            drain(&mut r, values, |v| Ok(*v))
        }
        ColumnReader::FloatColumnReader(mut r) => {
            let Column::Real(values) = column.get_or_insert(Column::Real(Vec::new())) else {
                return Err(other());
            };
            drain(&mut r, values, |v| Ok(f64::from(*v)))
        }
        ColumnReader::DoubleColumnReader(mut r) => {
            let Column::Real(values) = column.get_or_insert(Column::Real(Vec::new())) else {
                return Err(other());
            };
            drain(&mut r, values, |v| Ok(*v))
        }
        ColumnReader::ByteArrayColumnReader(mut r) => {
            let Column::Text(values) = column.get_or_insert(Column::Text(Vec::new())) else {
                return Err(other());
            };
            // A table repeats a few texts in all rows: each is kept once.
            let mut known: HashMap<Rc<str>, Rc<str>> = HashMap::new();
            drain(&mut r, values, |v: &ByteArray| {
                let text = v.as_utf8()?;
                if let Some(known) = known.get(text) {
                    return Ok(known.clone());
                }
                let text: Rc<str> = tame(text).into();
                known.insert(text.clone(), text.clone());
                Ok(text)
            })
        }
        _ => bail!("a column of a type that these tables don't have"),
    }
}

/// Reads a column to its end.
fn drain<T: DataType, V>(
    reader: &mut ColumnReaderImpl<T>,
    out: &mut Vec<Option<V>>,
    mut convert: impl FnMut(&T::T) -> Result<V, ParquetError>,
) -> Result<()> {
    loop {
        let (mut values, mut levels) = (Vec::new(), Vec::new());
        let (records, _, _) = reader.read_records(STRIDE, Some(&mut levels), None, &mut values)?;
        if records == 0 {
            return Ok(());
        }
        if out.len() + records > MOST_ROWS {
            bail!("over {MOST_ROWS} rows");
        }
        // A column without nulls has no levels.
        let mut values = values.iter();
        for i in 0..records {
            let present = levels.get(i).is_none_or(|l| *l > 0);
            let value = if present { values.next().map(&mut convert).transpose()? } else { None };
            out.push(value);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may panic")]
pub mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArrayType, DoubleType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// A value of a test table.
    pub enum V {
        /// Whole.
        I(&'static [i64]),
        /// Real.
        D(&'static [f64]),
        /// Text.
        T(&'static [&'static str]),
    }

    /// A Parquet file with these columns.
    pub fn file(columns: &[(&str, V)]) -> Vec<u8> {
        let fields: String = columns
            .iter()
            .map(|(name, v)| match v {
                V::I(_) => format!("OPTIONAL INT64 {name}; "),
                V::D(_) => format!("OPTIONAL DOUBLE {name}; "),
                V::T(_) => format!("OPTIONAL BYTE_ARRAY {name} (UTF8); "),
            })
            .collect();
        let schema = parse_message_type(&format!("message t {{ {fields} }}")).unwrap();
        let properties = WriterProperties::builder()
            .set_compression(parquet::basic::Compression::SNAPPY)
            .build();
        let mut out = Vec::new();
        let mut writer =
            SerializedFileWriter::new(&mut out, Arc::new(schema), Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for (_, v) in columns {
            let mut column = group.next_column().unwrap().unwrap();
            match v {
                V::I(v) => {
                    column.typed::<Int64Type>().write_batch(v, Some(&vec![1; v.len()]), None)
                }
                V::D(v) => {
                    column.typed::<DoubleType>().write_batch(v, Some(&vec![1; v.len()]), None)
                }
                V::T(v) => {
                    let v: Vec<ByteArray> = v.iter().map(|t| ByteArray::from(*t)).collect();
                    column.typed::<ByteArrayType>().write_batch(&v, Some(&vec![1; v.len()]), None)
                }
            }
            .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        out
    }

    #[test]
    fn columns_come_back() {
        let bytes =
            file(&[("m", V::I(&[1, 2])), ("t", V::D(&[0.5, f64::NAN])), ("k", V::T(&["a", "b"]))]);
        let columns = Columns::read("f", bytes, &["m", "t", "k", "absent"]).unwrap();
        assert_eq!(
            (columns.rows, columns.whole("m", 1), columns.real("t", 0)),
            (2, Some(2), Some(0.5))
        );
        assert_eq!(columns.text("k", 0).as_deref(), Some("a"));
        assert_eq!((columns.whole("k", 0), columns.whole("m", 2)), (None, None));
        assert!(columns.expect("f", &["m"]).is_ok() && columns.expect("f", &["absent"]).is_err());
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let whole = file(&[("m", V::I(&[1, 2, 3])), ("k", V::T(&["a", "b", "c"]))]);
        for cut in 0..whole.len() {
            assert!(Columns::read("f", whole[..cut].to_vec(), &["m", "k"]).is_err(), "{cut}");
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            if let Err(error) = Columns::read("f", bytes, &["m", "k"]) {
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
}
