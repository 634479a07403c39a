//! The pickled state dict inside a `.pth` or `.bin`, read as data and never executed: the few names that torch writes
//! into it (`_rebuild_tensor_v2`, `OrderedDict`, storage types) are recognised, every other one becomes an inert value.
//!
//! Values live in an arena and refer to each other by index, and there is a limit to their number, so that a hostile pickle
//! can neither nest deeper than the stack nor take more memory than a real one many times over.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use candle_core::DType;

/// Where a tensor's numbers are: elements of one storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pickled {
    pub(super) storage: Arc<str>,
    pub(super) dtype: DType,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) stride: Vec<usize>,
}

#[derive(Clone, Copy, Debug)]
enum Value {
    Int(i64),
    Other,
    At(usize),
}

#[derive(Debug)]
enum Item {
    Text(Arc<str>),
    Global(Arc<str>),
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Storage { dtype: Option<DType>, key: Arc<str> },
    Tensor(Pickled),
    Unreadable(String),
}

/// Larger state dicts do not exist; a file that claims one is refused before it is read. (One of 1300 tensors has 200 kB.)
const LONGEST: usize = 16 << 20;
/// Nor do any with more values; the same holds for those that wait on the stack. (1300 tensors take 30 000.)
const MOST: usize = 1 << 19;
/// Names of Python objects are shorter.
const NAME: usize = 128;
/// A tensor has fewer axes.
const AXES: usize = 16;

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    arena: Vec<Item>,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: HashMap<usize, Value>,
}

type Step<T> = Result<T, String>;

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len());
        let end = end.ok_or_else(|| "the pickle ends too early".to_string())?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn uint(&mut self, width: usize) -> Step<usize> {
        let n = super::archive::number(self.take(width)?, 0, width).unwrap_or(0);
        usize::try_from(n).map_err(|_| "a length in the pickle is too large".to_string())
    }

    fn text(&mut self, n: usize) -> Step<String> {
        Ok(String::from_utf8_lossy(self.take(n)?).into_owned())
    }

    fn line(&mut self) -> Step<String> {
        let rest = &self.bytes[self.at.min(self.bytes.len())..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or("the pickle ends within a name")?;
        let text = self.text(n)?;
        self.at += 1;
        Ok(text)
    }

    fn make(&mut self, item: Item) -> Value {
        self.arena.push(item);
        Value::At(self.arena.len() - 1)
    }

    fn push(&mut self, item: Item) {
        let v = self.make(item);
        self.stack.push(v);
    }

    fn pop(&mut self) -> Step<Value> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the pickle takes from an empty stack".into());
        }
        self.stack.pop().ok_or_else(|| "the pickle takes from an empty stack".into())
    }

    fn pop_mark(&mut self) -> Step<Vec<Value>> {
        let mark = self.marks.pop().ok_or("the pickle has no mark to go back to")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn item(&self, v: Value) -> Option<&Item> {
        match v {
            Value::At(i) => self.arena.get(i),
            _ => None,
        }
    }

    fn tuple(&self, v: Value) -> Step<&[Value]> {
        match self.item(v) {
            Some(Item::Tuple(t) | Item::List(t)) => Ok(t),
            _ => Err("the pickle has no tuple where one belongs".into()),
        }
    }

    fn sizes(&self, v: Value) -> Step<Vec<usize>> {
        let list = self.tuple(v)?;
        if list.len() > AXES {
            return Err(format!("a tensor of {} axes", list.len()));
        }
        list.iter()
            .map(|v| match v {
                Value::Int(n) if *n >= 0 => Ok(*n as usize),
                _ => Err("a tensor's size is not a count".into()),
            })
            .collect()
    }

    fn remember(&mut self, slot: usize) -> Step<()> {
        let top = *self.stack.last().ok_or("the pickle remembers nothing")?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Step<()> {
        let v = self.memo.get(&slot).copied().ok_or("the pickle recalls what it never remembered")?;
        self.stack.push(v);
        Ok(())
    }

    fn reduce(&mut self) -> Step<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let name = match self.item(callable) {
            Some(Item::Global(name)) => name.clone(),
            _ => "".into(),
        };
        let made = match &*name {
            "torch._utils _rebuild_tensor_v2" | "torch._utils _rebuild_tensor" => {
                let list = self.tuple(arguments)?;
                let [storage, Value::Int(offset), shape, stride, ..] = *list else {
                    return Err("a tensor in the pickle lacks its sizes".into());
                };
                match self.item(storage) {
                    Some(Item::Storage { dtype: Some(dtype), key }) => Item::Tensor(Pickled {
                        storage: key.clone(),
                        dtype: *dtype,
                        offset: usize::try_from(offset).map_err(|_| "a tensor begins before its storage")?,
                        shape: self.sizes(shape)?,
                        stride: self.sizes(stride)?,
                    }),
                    _ => Item::Unreadable("an element type that is not read".into()),
                }
            }
            "torch._utils _rebuild_parameter" => {
                let v = *self.tuple(arguments)?.first().ok_or("a parameter in the pickle is empty")?;
                self.stack.push(v);
                return Ok(());
            }
            "collections OrderedDict" => Item::Dict(Vec::new()),
            other => {
                let name: String = other.chars().take(NAME).collect();
                Item::Unreadable(format!("a value made by `{name}`, which is not run"))
            }
        };
        self.push(made);
        Ok(())
    }

    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let list = self.tuple(id)?;
        let (kind, key) = match (list.get(1).map(|v| self.item(*v)), list.get(2).map(|v| self.item(*v))) {
            (Some(Some(Item::Global(kind))), Some(Some(Item::Text(key)))) => (kind.clone(), key.clone()),
            _ => return Err("a storage in the pickle is not described as torch does".into()),
        };
        let dtype = match &*kind {
            "torch FloatStorage" => Some(DType::F32),
            "torch DoubleStorage" => Some(DType::F64),
            "torch HalfStorage" => Some(DType::F16),
            "torch BFloat16Storage" => Some(DType::BF16),
            "torch LongStorage" => Some(DType::I64),
            "torch IntStorage" => Some(DType::I32),
            "torch ShortStorage" => Some(DType::I16),
            "torch ByteStorage" | "torch BoolStorage" => Some(DType::U8),
            _ => None,
        };
        self.push(Item::Storage { dtype, key });
        Ok(())
    }

    fn extend(&mut self, values: Vec<Value>, pairs: bool) -> Step<()> {
        let target = *self.stack.last().ok_or("the pickle adds to nothing")?;
        let Value::At(i) = target else { return Ok(()) };
        match &mut self.arena[i] {
            Item::Dict(d) if pairs => d.extend(values.chunks_exact(2).map(|p| (p[0], p[1]))),
            Item::List(l) if !pairs => l.extend(values),
            _ => {}
        }
        Ok(())
    }

    /// Runs one operation; true at the end.
    fn step(&mut self) -> Step<bool> {
        let code = self.take(1)?[0];
        match code {
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return Ok(true),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = *self.stack.last().ok_or("the pickle doubles nothing")?;
                self.stack.push(top);
            }
            b'N' | 0x88 | 0x89 => self.stack.push(Value::Other),
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Other);
            }
            b'K' => {
                let n = self.uint(1)?;
                self.stack.push(Value::Int(n as i64));
            }
            b'M' => {
                let n = self.uint(2)?;
                self.stack.push(Value::Int(n as i64));
            }
            b'J' => {
                let n = self.uint(4)? as u32;
                self.stack.push(Value::Int(i64::from(n as i32)));
            }
            0x8a => {
                let width = self.uint(1)?;
                let bytes = self.take(width)?;
                let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                let mut wide = [if negative { 0xff } else { 0 }; 8];
                let fits = width <= 8;
                for (w, b) in wide.iter_mut().zip(bytes) {
                    *w = *b;
                }
                self.stack.push(if fits { Value::Int(i64::from_le_bytes(wide)) } else { Value::Other });
            }
            b'X' | 0x8c | 0x8d | b'U' | b'T' | b'B' | b'C' | 0x8e => {
                let width = match code {
                    0x8c | b'U' | b'C' => 1,
                    0x8d | 0x8e => 8,
                    _ => 4,
                };
                let n = self.uint(width)?;
                let text = self.text(n)?;
                self.push(Item::Text(text.into()));
            }
            b'c' => {
                let name = format!("{} {}", self.line()?, self.line()?);
                self.push(Item::Global(name.into()));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.item(module), self.item(name)) {
                    (Some(Item::Text(m)), Some(Item::Text(n))) if m.len() + n.len() < NAME => {
                        let name = format!("{m} {n}");
                        self.push(Item::Global(name.into()));
                    }
                    _ => return Err("the pickle names something without a name".into()),
                }
            }
            b')' => self.push(Item::Tuple(Vec::new())),
            b']' => self.push(Item::List(Vec::new())),
            b'}' => self.push(Item::Dict(Vec::new())),
            b't' => {
                let values = self.pop_mark()?;
                self.push(Item::Tuple(values));
            }
            b'l' => {
                let values = self.pop_mark()?;
                self.push(Item::List(values));
            }
            0x85..=0x87 => {
                let mut values = Vec::new();
                for _ in 0x85..=code {
                    values.push(self.pop()?);
                }
                values.reverse();
                self.push(Item::Tuple(values));
            }
            b'a' => {
                let v = self.pop()?;
                self.extend(vec![v], false)?;
            }
            b'e' => {
                let values = self.pop_mark()?;
                self.extend(values, false)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend(vec![key, value], true)?;
            }
            b'u' => {
                let values = self.pop_mark()?;
                self.extend(values, true)?;
            }
            b'q' => {
                let slot = self.uint(1)?;
                self.remember(slot)?;
            }
            b'r' => {
                let slot = self.uint(4)?;
                self.remember(slot)?;
            }
            0x94 => self.remember(self.memo.len())?,
            b'h' => {
                let slot = self.uint(1)?;
                self.recall(slot)?;
            }
            b'j' => {
                let slot = self.uint(4)?;
                self.recall(slot)?;
            }
            b'Q' => self.persistent()?,
            b'R' | 0x81 => self.reduce()?,
            // the state that an object would be given: nothing here has any
            b'b' => drop(self.pop()?),
            other => return Err(format!("the pickle has an operation ({other:#04x}) that torch.save does not write")),
        }
        if self.arena.len() > MOST || self.stack.len() > MOST {
            return Err(format!("its pickle has more than {MOST} values; no state dict has as many"));
        }
        Ok(false)
    }

    /// Tensors of a dict by name; one dict deeper under the usual names of a training checkpoint.
    fn tensors(&self, v: Value, deeper: bool) -> Step<BTreeMap<Arc<str>, Pickled>> {
        let Some(Item::Dict(pairs)) = self.item(v) else {
            return Err("the file holds no state dict (a dictionary of tensors)".into());
        };
        let mut out = BTreeMap::new();
        for (key, value) in pairs {
            let Some(Item::Text(key)) = self.item(*key) else { continue };
            match self.item(*value) {
                // A name that comes again takes the place of the first, as in any dictionary.
                Some(Item::Tensor(t)) => drop(out.insert(key.clone(), t.clone())),
                Some(Item::Unreadable(why)) => return Err(format!("{key} is {why}")),
                Some(Item::Dict(_)) if deeper && ["state_dict", "model", "module"].contains(&&**key) => {
                    out.extend(self.tensors(*value, false)?);
                }
                _ => {}
            }
        }
        Ok(out)
    }
}

/// Names and places of all tensors of a pickled state dict.
pub(super) fn tensors(bytes: &[u8]) -> Result<BTreeMap<Arc<str>, Pickled>, String> {
    if bytes.len() > LONGEST {
        return Err(format!("its pickle has {} bytes; no state dict is that large", bytes.len()));
    }
    let mut m = Machine { bytes, at: 0, arena: vec![], stack: vec![], marks: vec![], memo: HashMap::new() };
    while !m.step()? {}
    let top = m.pop()?;
    m.tensors(top, true)
}
