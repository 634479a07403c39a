//! NCCL between the cards of this process: sends, receives and exchanges in the order of each card's stream.
//!
//! The library is loaded when several cards are first used together, so a machine without it runs everything else. What
//! the shapes are goes through queues in this process; only numbers go over NCCL. Each rank's thread calls for its own
//! communicator alone; all are made by one call, so nobody waits for a rank that never comes.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::{DType, Device, Shape, Tensor};
use libloading::Library;

use super::{address, context, empty};
use crate::model::{
    Error, Result,
    ranks::{Breaker, Ends, Link, mesh},
};

/// Names under which the library is installed.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// `ncclUint8` of nccl.h: bytes travel, whatever they mean.
const BYTES: c_int = 1;

type Communicator = *mut c_void;

/// The functions of NCCL that are used (nccl.h of NCCL 2; stable since 2.7).
struct Nccl {
    init_all: unsafe extern "C" fn(*mut Communicator, c_int, *const c_int) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Communicator, *mut c_void) -> c_int,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Communicator, *mut c_void) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    abort: unsafe extern "C" fn(Communicator) -> c_int,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

impl Nccl {
    fn get() -> Result<&'static Nccl> {
        static LOADED: OnceLock<std::result::Result<Nccl, String>> = OnceLock::new();
        LOADED.get_or_init(Nccl::load).as_ref().map_err(|why| {
            Error::Config(format!(
                "several cards talk through NCCL, which cannot be loaded ({why}); install NVIDIA's NCCL 2 where the \
                 loader finds libnccl.so.2 (LD_LIBRARY_PATH), or set s2v.wire = \"memory\""
            ))
        })
    }

    fn load() -> std::result::Result<Nccl, String> {
        // SAFETY: NCCL's initialisers have no preconditions.
        let open = |name: &str| unsafe { Library::new(name) };
        let library = open(NAMES[0]).or_else(|why| open(NAMES[1]).map_err(|_| why)).map_err(|e| e.to_string())?;
        // SAFETY: the types are those of nccl.h, and the library is kept as long as the pointers.
        unsafe {
            macro_rules! function {
                ($name:literal) => {
                    *library.get($name).map_err(|e| e.to_string())?
                };
            }
            Ok(Nccl {
                init_all: function!(b"ncclCommInitAll\0"),
                send: function!(b"ncclSend\0"),
                receive: function!(b"ncclRecv\0"),
                group_start: function!(b"ncclGroupStart\0"),
                group_end: function!(b"ncclGroupEnd\0"),
                abort: function!(b"ncclCommAbort\0"),
                text: function!(b"ncclGetErrorString\0"),
                _library: library,
            })
        }
    }

    fn did(&self, what: &str, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: gives a constant text for every number.
        let text = unsafe { CStr::from_ptr((self.text)(status)) }.to_string_lossy();
        Err(Error::Link(format!("NCCL, {what}: {text}")))
    }
}

/// One card's communicator; aborted once, by whoever comes first.
struct Endpoint {
    nccl: &'static Nccl,
    communicator: Communicator,
    gone: AtomicBool,
}

// SAFETY: one thread at a time calls for a communicator; aborting it meanwhile is what ncclCommAbort is for.
unsafe impl Send for Endpoint {}
// SAFETY: see above.
unsafe impl Sync for Endpoint {}

impl Endpoint {
    fn abort(&self) {
        if !self.gone.swap(true, Ordering::AcqRel) {
            // SAFETY: the communicator is live until here.
            let _ = unsafe { (self.nccl.abort)(self.communicator) };
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.abort();
    }
}

/// What a tensor on its way will be.
type Label = Vec<(Shape, DType)>;

struct Wire {
    ends: Ends<Label>,
    device: Device,
    end: Arc<Endpoint>,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NCCL rank {}", self.ends.rank)
    }
}

fn label(parcel: &[Tensor]) -> Label {
    parcel.iter().map(|t| (t.shape().clone(), t.dtype())).collect()
}

impl Wire {
    fn alive(&self) -> Result<&Nccl> {
        match self.end.gone.load(Ordering::Acquire) {
            true => Err(Error::Link("the cards are no longer connected".into())),
            false => Ok(self.end.nccl),
        }
    }

    fn queue_send(&self, to: usize, t: &Tensor) -> Result<()> {
        let (nccl, stream) = (self.alive()?, context(&self.device)?.stream());
        let bytes = t.elem_count() * t.dtype().size_in_bytes();
        // SAFETY: the tensor is contiguous (`address` refuses others); its memory is reused in the order of this stream.
        let status = unsafe {
            (nccl.send)(address(t)? as *const c_void, bytes, BYTES, to as c_int, self.end.communicator, stream)
        };
        nccl.did("send", status)
    }

    fn queue_receive(&self, from: usize, (shape, dtype): &(Shape, DType)) -> Result<Tensor> {
        let (nccl, stream) = (self.alive()?, context(&self.device)?.stream());
        let t = empty(&self.device, shape.clone(), *dtype)?;
        let bytes = t.elem_count() * dtype.size_in_bytes();
        // SAFETY: the memory is as large as said, and read in the order of this stream only.
        let status = unsafe {
            (nccl.receive)(address(&t)? as *mut c_void, bytes, BYTES, from as c_int, self.end.communicator, stream)
        };
        nccl.did("receive", status)?;
        Ok(t)
    }

    /// Everything that `calls` queues becomes one operation.
    fn together<T>(&self, calls: impl FnOnce() -> Result<T>) -> Result<T> {
        let nccl = self.alive()?;
        // SAFETY: a group belongs to this thread and is ended below, whatever happens inside.
        nccl.did("group", unsafe { (nccl.group_start)() })?;
        let out = calls();
        // SAFETY: see above.
        let ended = nccl.did("group", unsafe { (nccl.group_end)() });
        let out = out?;
        ended.map(|()| out)
    }
}

impl Link for Wire {
    fn rank(&self) -> usize {
        self.ends.rank
    }

    fn send(&self, to: usize, parcel: Vec<Tensor>) -> Result<()> {
        let parcel = parcel.iter().map(Tensor::contiguous).collect::<candle_core::Result<Vec<_>>>()?;
        self.ends.send(to, label(&parcel))?;
        self.together(|| parcel.iter().try_for_each(|t| self.queue_send(to, t)))
    }

    fn receive(&self, from: usize) -> Result<Vec<Tensor>> {
        let labels = self.ends.receive(from)?;
        self.together(|| labels.iter().map(|l| self.queue_receive(from, l)).collect())
    }

    fn exchange(&self, team: Range<usize>, mut parcels: Vec<Vec<Tensor>>) -> Result<Vec<Vec<Tensor>>> {
        let me = self.rank();
        let others = || team.clone().enumerate().filter(|(_, rank)| *rank != me);
        for (i, rank) in others() {
            self.ends.send(rank, label(&parcels[i]))?;
        }
        let labels = others().map(|(i, rank)| Ok((i, rank, self.ends.receive(rank)?))).collect::<Result<Vec<_>>>()?;
        let got = self.together(|| {
            for (i, rank) in others() {
                parcels[i].iter().try_for_each(|t| self.queue_send(rank, t))?;
            }
            let parcel = |(i, rank, labels): &(usize, usize, Label)| -> Result<(usize, Vec<Tensor>)> {
                Ok((*i, labels.iter().map(|l| self.queue_receive(*rank, l)).collect::<Result<_>>()?))
            };
            labels.iter().map(parcel).collect::<Result<Vec<_>>>()
        })?;
        // What was sent is kept until here: its memory may then be reused, in the order of this stream.
        for (i, parcel) in got {
            parcels[i] = parcel;
        }
        Ok(parcels)
    }

    fn breaker(&self) -> Option<Breaker> {
        let end = self.end.clone();
        Some(Arc::new(move || end.abort()))
    }
}

/// Links between ranks, each on another card.
///
/// # Errors
/// NCCL is missing, refuses, or two ranks share a card.
pub(crate) fn links(devices: &[Device]) -> Result<Vec<Arc<dyn Link>>> {
    let nccl = Nccl::get()?;
    let cards = devices.iter().map(super::ordinal).collect::<Result<Vec<c_int>>>()?;
    if cards.iter().enumerate().any(|(i, card)| cards[..i].contains(card)) {
        return Err(Error::Config(
            "NCCL takes each card once; name every card once, or set s2v.wire = \"memory\"".into(),
        ));
    }
    let mut communicators = vec![std::ptr::null_mut(); cards.len()];
    // SAFETY: room for as many communicators as there are cards.
    let status = unsafe { (nccl.init_all)(communicators.as_mut_ptr(), cards.len() as c_int, cards.as_ptr()) };
    nccl.did("connecting the cards", status)?;
    let ends = mesh(devices.len()).into_iter().zip(devices).zip(communicators);
    let link = |((ends, device), communicator): ((Ends<Label>, &Device), Communicator)| {
        let end = Arc::new(Endpoint { nccl, communicator, gone: AtomicBool::new(false) });
        Arc::new(Wire { ends, device: device.clone(), end }) as Arc<dyn Link>
    };
    Ok(ends.map(link).collect())
}
