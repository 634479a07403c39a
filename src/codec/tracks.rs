//! What whole and fragmented MP4 files have in common: parameter sets, sample descriptions, NAL units.
//!
//! Sources: ISO/IEC 14496-15 (avcC), "Encapsulation of Opus in ISO Base Media File Format" 0.8.1 (dOps).

use super::mp4::Mp4Error;
use shiguredo_mp4::{
    BoxSize, BoxType, FixedPointNumber, Uint,
    boxes::{
        AudioSampleEntryFields, Avc1Box, AvccBox, DopsBox, OpusBox, SampleEntry, UnknownBox, VisualSampleEntryFields,
    },
};

/// Units per second of the video track.
pub(super) const VIDEO_SCALE: u32 = 90_000;
/// Units per second of the voice track and of the movie.
pub(super) const VOICE_SCALE: u32 = 48_000;

type Result<T> = std::result::Result<T, Mp4Error>;

/// The parameter sets of one video track, which stand in its sample description.
#[derive(Default)]
pub(super) struct Parameters(Option<(Vec<u8>, Vec<u8>)>);

impl Parameters {
    /// Appends an access unit (Annex B) to `out` in length-prefixed form; parameter sets are taken out and remembered.
    ///
    /// # Errors
    /// [`Mp4Error::Stream`] when the first unit carries no parameter sets, [`Mp4Error::Changed`] when later ones change
    /// them; `out` is then as it was.
    pub(super) fn take(&mut self, access_unit: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let before = out.len();
        let taken = self.each(access_unit, out);
        if taken.is_err() {
            out.truncate(before);
        }
        taken
    }

    fn each(&mut self, access_unit: &[u8], out: &mut Vec<u8>) -> Result<()> {
        for unit in nal_units(access_unit) {
            match unit[0] & 0x1f {
                kind @ (7 | 8) => {
                    let known = match (kind, &self.0) {
                        (7, Some((sps, _))) => Some(sps),
                        (8, Some((_, pps))) if !pps.is_empty() => Some(pps),
                        _ => None,
                    };
                    match (known, kind) {
                        (Some(known), _) if known != unit => return Err(Mp4Error::Changed),
                        (Some(_), _) => {}
                        (None, 7) => self.0 = Some((unit.to_vec(), Vec::new())),
                        (None, _) => match &mut self.0 {
                            Some((_, pps)) => *pps = unit.to_vec(),
                            None => return Err(Mp4Error::Stream("a picture parameter set stands alone")),
                        },
                    }
                }
                9 => {}
                _ => {
                    out.extend_from_slice(&(unit.len() as u32).to_be_bytes());
                    out.extend_from_slice(unit);
                }
            }
        }
        if !self.0.as_ref().is_some_and(|(sps, pps)| sps.len() >= 4 && !pps.is_empty()) {
            return Err(Mp4Error::Stream("it does not begin with parameter sets"));
        }
        Ok(())
    }

    /// The video track's sample description.
    pub(super) fn entry(&self, width: u32, height: u32) -> Result<SampleEntry> {
        let Some((sps, pps)) = &self.0 else {
            return Err(Mp4Error::Stream("it does not begin with parameter sets"));
        };
        // H.264 A.2: these profiles carry extra fields in avcC, which are not written here.
        if matches!(sps[1], 100 | 110 | 122 | 144 | 244) {
            return Err(Mp4Error::Stream("its profile is above Main"));
        }
        let visual = VisualSampleEntryFields {
            data_reference_index: VisualSampleEntryFields::DEFAULT_DATA_REFERENCE_INDEX,
            width: width as u16,
            height: height as u16,
            horizresolution: VisualSampleEntryFields::DEFAULT_HORIZRESOLUTION,
            vertresolution: VisualSampleEntryFields::DEFAULT_VERTRESOLUTION,
            frame_count: VisualSampleEntryFields::DEFAULT_FRAME_COUNT,
            compressorname: VisualSampleEntryFields::NULL_COMPRESSORNAME,
            depth: VisualSampleEntryFields::DEFAULT_DEPTH,
        };
        let avcc_box = AvccBox {
            avc_profile_indication: sps[1],
            profile_compatibility: sps[2],
            avc_level_indication: sps[3],
            length_size_minus_one: Uint::new(3),
            sps_list: vec![sps.clone()],
            pps_list: vec![pps.clone()],
            chroma_format: None,
            bit_depth_luma_minus8: None,
            bit_depth_chroma_minus8: None,
            sps_ext_list: vec![],
        };
        // BT.601 throughout, limited range: the same as the stream itself says.
        let colour = unknown(*b"colr", b"nclx\x00\x06\x00\x06\x00\x06\x00".to_vec());
        Ok(SampleEntry::Avc1(Avc1Box { visual, avcc_box, unknown_boxes: vec![colour] }))
    }
}

/// The voice track's sample description. `pre_skip`: samples at 48 kHz before the voice.
pub(super) fn voice_entry(pre_skip: u16) -> SampleEntry {
    SampleEntry::Opus(OpusBox {
        audio: AudioSampleEntryFields {
            data_reference_index: AudioSampleEntryFields::DEFAULT_DATA_REFERENCE_INDEX,
            channelcount: 1,
            samplesize: AudioSampleEntryFields::DEFAULT_SAMPLESIZE,
            samplerate: FixedPointNumber::new(VOICE_SCALE as u16, 0),
        },
        dops_box: DopsBox { output_channel_count: 1, pre_skip, input_sample_rate: VOICE_SCALE, output_gain: 0 },
        unknown_boxes: vec![],
    })
}

pub(super) fn unknown(kind: [u8; 4], payload: Vec<u8>) -> UnknownBox {
    UnknownBox {
        box_type: BoxType::Normal(kind),
        box_size: BoxSize::with_payload_size(BoxType::Normal(kind), payload.len() as u64),
        payload,
    }
}

/// The NAL units of an Annex B byte stream, without start codes; empty ones are left out.
fn nal_units(stream: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut starts = Vec::new();
    let mut i = 0;
    while i + 3 <= stream.len() {
        if stream[i..i + 3] == [0, 0, 1] {
            starts.push(i);
            i += 3;
        } else {
            i += 1;
        }
    }
    let ends: Vec<usize> = starts.iter().skip(1).copied().chain([stream.len()]).collect();
    starts.into_iter().zip(ends).filter_map(move |(start, end)| {
        let unit = &stream[start + 3..end];
        // Zeros before the next start code belong to it.
        let unit = &unit[..unit.iter().rposition(|&b| b != 0).map_or(0, |p| p + 1)];
        (!unit.is_empty()).then_some(unit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nal_units_are_cut_at_both_kinds_of_start_code() {
        let stream = [0, 0, 0, 1, 0x67, 1, 2, 0, 0, 1, 0x68, 9, 0, 0, 0, 1, 0x65, 0, 0, 3, 7];
        let units: Vec<&[u8]> = nal_units(&stream).collect();
        assert_eq!(units, [&[0x67, 1, 2][..], &[0x68, 9], &[0x65, 0, 0, 3, 7]]);
        assert_eq!(nal_units(&[0, 0, 1]).count(), 0);
        assert_eq!(nal_units(&[]).count(), 0);
    }
}
